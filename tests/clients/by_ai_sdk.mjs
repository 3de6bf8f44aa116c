// The AI SDK with its provider for servers like OpenAI's: text, a stream with its usage, a picture, a tool, and an object of a schema.

import assert from "node:assert";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [scripted, mini] = process.argv.slice(2);
const { resolve } = createRequire(`${process.env.MAVERICK_NODE}/`);
const load = (name) => import(pathToFileURL(resolve(name)));
const { generateText, generateObject, jsonSchema, stepCountIs, streamText, tool } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");

const of = (url) =>
  createOpenAICompatible({ name: "maverick", baseURL: `${url}/v1`, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true })("mini");
const cold = { model: of(mini), temperature: 0, maxOutputTokens: 12, maxRetries: 0 };

const whole = await generateText({ ...cold, prompt: "What is the sum?" });
assert(whole.text.length > 0);

const stream = streamText({ ...cold, prompt: "What is the sum?" });
let text = "";
for await (const part of stream.textStream) text += part;
assert.equal(text, whole.text);
const usage = await stream.usage;
assert(usage.inputTokens > 0 && usage.outputTokens > 0);

const dot = Buffer.from("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==", "base64");
const content = [{ type: "image", image: dot, mediaType: "image/png" }, { type: "text", text: "What is the sum?" }];
const shown = await generateText({ ...cold, messages: [{ role: "user", content }] });
assert(shown.usage.inputTokens > whole.usage.inputTokens);

const sum = jsonSchema({ type: "object", properties: { sum: { type: "boolean" } }, required: ["sum"], additionalProperties: false });
const { object } = await generateObject({ ...cold, schema: sum, prompt: "What is the sum?", maxOutputTokens: 40 });
assert.equal(typeof object.sum, "boolean");

const asked = [];
const city = jsonSchema({ type: "object", properties: { city: { type: "string" } }, required: ["city"] });
const execute = async ({ city }) => (asked.push(city), "cold");
const weather = tool({ description: "How the weather is.", inputSchema: city, execute });
for (const call of [generateText, streamText]) {
  const told = await call({ model: of(scripted), prompt: "How is the weather in Oslo?", tools: { weather }, stopWhen: stepCountIs(3) });
  assert.equal(await told.text, "It is cold in Oslo.");
}
assert.deepEqual(asked, ["Oslo", "Oslo"]);
