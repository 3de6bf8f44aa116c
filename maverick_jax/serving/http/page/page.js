// A conversation with the model of this server, by /v1/chat/completions like any other client.
// State: `messages`, what was said; `answering`, which stops the answer that is coming, or null. All else is drawn from these.

const find = (id) => document.getElementById(id);
const settings = find("settings").querySelector("form").elements;
const KEPT = ["system", "temperature", "top_p", "max_tokens", "seed"];
let messages = JSON.parse(sessionStorage.getItem("messages") || "[]"); // {role, text, pictures: [data URL], note, error}
let pictures = []; // of the next question
let answering = null;

// What is shown.

function element(name, values = {}, ...children) {
  const made = Object.assign(document.createElement(name), values);
  made.append(...children);
  return made;
}

function paragraphs(text) { // code between ``` stands in a box; everything else as it was written
  return text.split("```").map((part, i) => i % 2
    ? element("pre", {}, element("code", { textContent: part.replace(/^\w*\n/, "") }))
    : element("p", { textContent: part })).filter((made) => made.textContent);
}

function drawn(message, index) {
  const footer = element("footer");
  if (!answering) {
    if (message.role === "user") footer.append(button("Edit", () => edit(index)));
    else footer.append(button("Again", () => again(index)));
  }
  if (message.note) footer.append(message.note);
  return element("article", { className: message.role },
    ...(message.pictures || []).map((src, i) => element("img", { src, alt: `picture ${i + 1}` })),
    ...paragraphs(message.text),
    ...(message.error ? [element("p", { className: "error", textContent: message.error })] : []),
    footer);
}

function button(text, onclick) {
  return element("button", { type: "button", textContent: text, onclick });
}

function draw() {
  find("log").replaceChildren(...messages.map(drawn));
  find("log").scrollTop = find("log").scrollHeight;
  find("stop").hidden = !answering;
  find("send").disabled = Boolean(answering);
  try { sessionStorage.setItem("messages", JSON.stringify(messages)); } catch { /* too many pictures to keep */ }
}

function drawLast() { // while it comes, the rest stays as it is
  const log = find("log"), follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  log.lastElementChild.replaceWith(drawn(messages.at(-1), messages.length - 1));
  if (follows) log.scrollTop = log.scrollHeight;
}

function drawPictures() {
  find("pictures").replaceChildren(...pictures.map((src, i) => element("figure", {},
    element("img", { src, alt: `picture ${i + 1}` }),
    button("Remove", () => { pictures.splice(i, 1); drawPictures(); }))));
}

// What is asked.

function asked() {
  const body = { stream: true, stream_options: { include_usage: true } };
  for (const name of KEPT.slice(1)) if (settings[name].value) body[name] = Number(settings[name].value);
  body.messages = messages.slice(0, -1).map(({ role, text, pictures }) => ({
    role,
    content: pictures?.length
      ? [...pictures.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text }]
      : text,
  }));
  if (settings.system.value) body.messages.unshift({ role: "system", content: settings.system.value });
  return JSON.stringify(body);
}

async function* events(response) {
  let text = "";
  for await (const piece of response.body.pipeThrough(new TextDecoderStream())) {
    text += piece;
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

async function answer() {
  const message = { role: "assistant", text: "", note: "" };
  messages.push(message);
  answering = new AbortController();
  draw();
  const began = performance.now();
  let first = 0, tokens = 0;
  const told = () => {
    const seconds = (performance.now() - first) / 1000;
    const rate = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    message.note = first ? `first token after ${((first - began) / 1000).toFixed(2)} s${rate}` : "";
  };
  try {
    const headers = { "content-type": "application/json" };
    if (settings.key.value) headers.authorization = `Bearer ${settings.key.value}`;
    const response = await fetch("v1/chat/completions", { method: "POST", headers, body: asked(), signal: answering.signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta.content;
      if (delta) {
        first ||= performance.now();
        tokens += 1;
        message.text += delta;
      }
      if (event.usage) tokens = event.usage.completion_tokens;
      told();
      drawLast();
    }
  } catch (error) {
    if (error.name === "AbortError") message.note += message.note ? ", stopped" : "stopped";
    else message.error = error.message;
  }
  answering = null;
  draw();
}

function send() {
  const text = find("text").value.trim();
  if (answering || !(text || pictures.length)) return;
  messages.push({ role: "user", text, pictures });
  pictures = [];
  find("text").value = "";
  drawPictures();
  answer();
}

function edit(index) { // the question comes back to be changed, and what followed it goes
  find("text").value = messages[index].text;
  pictures = messages[index].pictures || [];
  messages = messages.slice(0, index);
  drawPictures();
  draw();
  find("text").focus();
}

function again(index) {
  messages = messages.slice(0, index);
  answer();
}

const stop = () => answering?.abort();

async function add(files) {
  for (const file of [...files]) { // the list empties itself when the event is over
    if (!file.type.startsWith("image/")) continue;
    pictures.push(await new Promise((done) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.readAsDataURL(file);
    }));
  }
  drawPictures();
}

// What people do.

find("composer").onsubmit = (event) => { event.preventDefault(); send(); };
find("stop").onclick = stop;
find("new").onclick = () => { stop(); messages = []; draw(); find("text").focus(); };
find("add").onclick = () => find("files").click();
find("files").onchange = (event) => { add(event.target.files); event.target.value = ""; };
find("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  const last = messages.findLastIndex(({ role }) => role === "user");
  if (event.key === "ArrowUp" && !find("text").value && !answering && last >= 0) { event.preventDefault(); edit(last); }
};
document.onkeydown = (event) => { if (event.key === "Escape") stop(); };
document.onpaste = (event) => add(event.clipboardData.files);
document.ondragover = (event) => { event.preventDefault(); find("composer").classList.add("over"); };
document.ondragleave = () => find("composer").classList.remove("over");
document.ondrop = (event) => { event.preventDefault(); find("composer").classList.remove("over"); add(event.dataTransfer.files); };
find("theme").onclick = () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  localStorage.theme = root.dataset.theme = dark ? "light" : "dark";
};
for (const name of KEPT) {
  settings[name].value = localStorage.getItem(name) || "";
  settings[name].onchange = () => localStorage.setItem(name, settings[name].value);
}
if (localStorage.theme) document.documentElement.dataset.theme = localStorage.theme;
fetch("v1/models").then((response) => response.ok ? response.json() : null).then((models) => {
  if (models) find("model").textContent = document.title = models.data[0].id;
  else find("status").textContent = "This server asks for an API key: see Settings.";
});
draw();
