// The page: conversations on the left, the current one on the right, and one request at a time.

import * as store from "./conversations.js";
import { parse, render } from "./markdown.js";
import * as pictures from "./pictures.js";

const $ = (id) => document.getElementById(id);
const BETWEEN_RENDERS = 100; // milliseconds

const state = {
  conversations: store.load(localStorage),
  settings: store.loadSettings(localStorage),
  current: null,
  model: "",
  chats: true, // false: a base model, which continues texts
  most: 0, // pictures of a conversation; 0: the model does not see
  maxBody: 0, // bytes of a request
  attached: [], // pictures of the next message
  urls: new Map(), // of the pictures of this conversation, by id
  controller: null, // of the running request
};

function random() {
  return [...crypto.getRandomValues(new Uint8Array(8))].map((b) => b.toString(16).padStart(2, "0")).join("");
}

function make(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function button(text, onClick, label) {
  const made = make("button", "", text);
  made.type = "button";
  if (label) made.setAttribute("aria-label", label);
  made.addEventListener("click", onClick);
  return made;
}

function say(text) {
  $("status").textContent = text;
}

async function copy(text, where) {
  try {
    await navigator.clipboard.writeText(text);
    where.textContent = "Copied";
  } catch (error) {
    where.textContent = "Not allowed";
  }
  setTimeout(() => { where.textContent = "Copy"; }, 1500);
}

function keep() {
  store.save(localStorage, state.conversations);
}

// The list of conversations

async function open(conversation) {
  state.controller?.abort();
  state.current = conversation;
  state.attached = [];
  showAttached();
  $("side").classList.remove("open");
  $("menu").setAttribute("aria-expanded", "false");
  showList();
  showTurns();
  $("ask").focus();
  const ids = store.pictureIds(conversation.turns).filter((id) => !state.urls.has(id));
  if (!ids.length) return;
  for (const [id, url] of await pictures.load(ids)) state.urls.set(id, url);
  if (state.current === conversation && !state.controller) showTurns();
}

function begin() {
  const empty = state.conversations.find((each) => !each.turns.length);
  const conversation = empty || store.create(random);
  if (!empty) state.conversations.unshift(conversation);
  open(conversation);
}

function remove(conversation) {
  state.conversations = state.conversations.filter((each) => each !== conversation);
  keep();
  if (conversation === state.current) begin();
  else showList();
}

function showList() {
  const items = state.conversations.map((each) => {
    const go = button(each.title, () => open(each));
    go.className = "open";
    go.setAttribute("aria-current", String(each === state.current));
    return make("li", "", go, button("\u00d7", () => remove(each), `Delete ${each.title}`));
  });
  $("list").replaceChildren(...items);
}

// The turns of a conversation

function showTurns() {
  const { turns } = state.current;
  const nodes = turns.map((turn, index) => turnNode(turn, index));
  if (!turns.length) nodes.push(make("p", "", "Ask something."));
  $("log").replaceChildren(...nodes);
  $("log").scrollTop = $("log").scrollHeight;
}

function turnNode(turn, index) {
  const node = make("article", `turn ${turn.role}`);
  node.append(make("h2", "", turn.role === "user" ? "You" : state.model || "Model"));
  if (turn.thought) node.append(thoughtNode(turn, false));
  const body = make("div", "body");
  if (turn.pictures?.length) node.append(picturesNode(turn.pictures));
  if (turn.role === "user") body.textContent = turn.content;
  else body.append(replyNode(turn));
  node.append(body);
  if (turn.fault) {
    const fault = make("p", "fault", turn.fault);
    fault.setAttribute("role", "alert");
    node.append(fault);
  }
  node.append(turn.role === "user" ? userActions(turn, index, node) : replyActions(turn, index));
  return node;
}

function picturesNode(shown) {
  return make("ul", "pictures", ...shown.map((each) => make("li", "", pictureNode(each))));
}

function pictureNode({ id, name }) {
  if (!state.urls.has(id)) return make("span", "fault", `${name} is not in this browser any more.`);
  const image = make("img", "");
  image.alt = name;
  image.src = state.urls.get(id);
  return image;
}

// What a base model writes is text as it stands, often code.
function replyNode(turn) {
  return state.chats ? render(parse(turn.content), document, copy) : make("pre", "", turn.content);
}

function thoughtNode(turn, isOpen) {
  const details = make("details", "thought");
  details.open = isOpen;
  const took = turn.seconds === undefined ? "Thinking" : `Thought for ${store.duration(turn.seconds)}`;
  details.append(make("summary", "", took), make("div", "", turn.thought));
  return details;
}

function userActions(turn, index, node) {
  return make("div", "actions", button("Edit", () => edit(turn, index, node)));
}

function replyActions(turn, index) {
  const copied = button("Copy", () => copy(turn.content, copied));
  const again = button("Regenerate", () => {
    state.current.turns.length = index;
    answer();
  });
  return make("div", "actions", copied, again);
}

function edit(turn, index, node) {
  if (state.controller) return;
  const field = make("textarea", "edit");
  field.value = turn.content;
  field.rows = Math.min(turn.content.split("\n").length + 1, 12);
  field.setAttribute("aria-label", "Message");
  const save = button("Send", () => {
    if (!field.value.trim() && !turn.pictures?.length) return;
    state.current.turns.length = index;
    ask(field.value, turn.pictures);
  });
  const actions = make("div", "actions", save, button("Cancel", showTurns));
  const shown = turn.pictures?.length ? [picturesNode(turn.pictures)] : [];
  node.replaceChildren(make("h2", "", "You"), ...shown, field, actions);
  field.focus();
}

// Pictures of the next message

async function attach(files) {
  if (!files.length) return;
  const problems = [];
  for (const file of files) {
    try {
      const picture = await pictures.read(file, random);
      checkRoom(picture);
      state.urls.set(picture.id, picture.url);
      state.attached.push(picture);
    } catch (error) {
      problems.push(error.message);
    }
  }
  showAttached();
  sayAttached(problems);
}

function sayAttached(problems = []) {
  const count = state.attached.length;
  const attached = count === 1 ? "1 picture is attached." : `${count || "No"} pictures are attached.`;
  say([...problems, attached].join(" "));
  $("ask").focus();
}

// Throws if the request would have too many pictures, or more bytes than the server takes.
function checkRoom(picture) {
  const { turns } = state.current;
  const some = [...state.attached, picture];
  if (store.pictureIds(turns).length + some.length > state.most) {
    throw new Error(`${picture.name} is one too many; a conversation has at most ${state.most} pictures.`);
  }
  const next = { role: "user", content: $("ask").value, pictures: some };
  const urls = new Map([...state.urls, [picture.id, picture.url]]);
  const asked = store.body([...turns, next], state.settings, state.model, true, urls);
  const bytes = new Blob([JSON.stringify(asked)]).size;
  if (bytes > state.maxBody) {
    const [size, most] = [bytes, state.maxBody].map((each) => (each / 1e6).toFixed(1));
    throw new Error(`With ${picture.name} the request has ${size} MB, and the server takes ${most}; make the picture smaller.`);
  }
}

function showAttached() {
  const items = state.attached.map((each) => {
    const gone = button("\u00d7", () => {
      state.attached = state.attached.filter((other) => other !== each);
      showAttached();
      sayAttached();
    }, `Remove ${each.name}`);
    return make("li", "", pictureNode(each), gone);
  });
  $("attached").replaceChildren(...items);
}

function setUpPictures() {
  const field = $("files");
  field.accept = pictures.KINDS.join(",");
  $("attach").addEventListener("click", () => field.click());
  field.addEventListener("change", async () => {
    await attach([...field.files]);
    field.value = "";
  });
  $("ask").addEventListener("paste", (event) => {
    const found = pictures.files(event.clipboardData);
    if (!state.most || !found.length) return;
    event.preventDefault();
    attach(found);
  });
  const target = document.querySelector("main");
  const over = (is) => target.classList.toggle("over", is);
  target.addEventListener("dragover", (event) => {
    if (!state.most || !event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    over(true);
  });
  target.addEventListener("dragleave", () => over(false));
  target.addEventListener("drop", (event) => {
    over(false);
    if (!state.most || !event.dataTransfer?.files.length) return;
    event.preventDefault();
    attach([...event.dataTransfer.files]);
  });
  const known = new Set(state.conversations.flatMap((each) => store.pictureIds(each.turns)));
  pictures.forgetAllBut(known);
}

// Asking

function ask(text, shown = []) {
  const { current } = state;
  const turn = { role: "user", content: text };
  if (shown.length) turn.pictures = shown.map(({ id, name }) => ({ id, name }));
  current.turns.push(turn);
  current.title = store.title(current.turns);
  state.conversations = [current, ...state.conversations.filter((each) => each !== current)];
  keep();
  showList();
  answer();
}

async function answer() {
  const { current } = state;
  const lost = store.pictureIds(current.turns).some((id) => !state.urls.has(id));
  const asked = store.body(current.turns, state.settings, state.model, state.chats, state.urls);
  const turn = { role: "assistant", content: "" };
  current.turns.push(turn);
  showTurns();
  const view = liveView(turn);
  state.controller = new AbortController();
  running(true);
  try {
    if (lost) throw new Error("A picture of this conversation is not in this browser any more.");
    await receive(asked, turn, view, state.controller.signal);
  } catch (error) {
    if (error.name !== "AbortError") turn.fault = error.message;
  }
  state.controller = null;
  running(false);
  if (turn.thought && turn.seconds === undefined) turn.seconds = view.seconds();
  if (!turn.content && !turn.thought && !turn.fault) current.turns.pop();
  keep();
  if (state.current === current) showTurns();
  if (turn.fault) say("The reply failed.");
}

function running(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("log").setAttribute("aria-busy", String(is));
  if (is) say("Waiting for the model");
  else $("ask").focus();
}

async function receive(asked, turn, view, signal) {
  const headers = { "Content-Type": "application/json" };
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  const response = await fetch(state.chats ? "v1/chat/completions" : "v1/completions", {
    method: "POST", headers, body: JSON.stringify(asked), signal,
  });
  if (!response.ok) throw new Error(await reason(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const events = store.eventReader();
  const began = performance.now();
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    for (const data of events(value)) {
      if (data === "[DONE]") return;
      take(JSON.parse(data), turn, view, began);
    }
  }
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch (error) {
    return `The server answered ${response.status}.`;
  }
}

function take(chunk, turn, view, began) {
  if (chunk.error) throw new Error(chunk.error.message);
  for (const { delta = {}, text, finish_reason: finish } of chunk.choices) {
    if (text) turn.content += text;
    if (delta.reasoning_content) turn.thought = (turn.thought || "") + delta.reasoning_content;
    if (delta.content) {
      if (turn.thought && turn.seconds === undefined) turn.seconds = view.seconds();
      turn.content += delta.content;
    }
    if (finish === "length") turn.fault = "The reply has reached its longest length.";
    if (finish === "insufficient_system_resource") turn.fault = "The server cut the reply off.";
    view.show();
  }
  const tokens = chunk.usage?.completion_tokens;
  if (tokens) {
    const seconds = (performance.now() - began) / 1000;
    say(`${tokens} tokens, ${(tokens / Math.max(seconds, 0.001)).toFixed(1)} per second`);
  }
}

// The reply while it comes: rendered at most ten times a second.
function liveView(turn) {
  const began = performance.now();
  const node = $("log").lastElementChild;
  const body = node.querySelector(".body");
  let details = null;
  let timer = null;
  const seconds = () => (performance.now() - began) / 1000;
  const draw = () => {
    timer = null;
    const { scrollTop, scrollHeight, clientHeight } = $("log");
    const follows = scrollHeight - scrollTop - clientHeight < 60;
    if (turn.thought) {
      if (!details) {
        details = thoughtNode(turn, true);
        body.before(details);
      }
      const over = turn.seconds !== undefined;
      const summary = over ? `Thought for ${store.duration(turn.seconds)}` : `Thinking, ${store.duration(seconds())}`;
      details.firstChild.textContent = summary;
      details.lastChild.textContent = turn.thought;
      if (over && !details.dataset.folded) {
        details.open = false;
        details.dataset.folded = "yes";
      }
    }
    body.replaceChildren(replyNode(turn));
    if (follows) $("log").scrollTop = $("log").scrollHeight;
  };
  return { seconds, show: () => { timer ??= setTimeout(draw, BETWEEN_RENDERS); } };
}

// Settings, theme and keys

function setUp() {
  for (const name of ["system", "temperature", "seed", "most", "thinking"]) {
    $(name).value = state.settings[name];
    $(name).addEventListener("change", () => {
      state.settings[name] = $(name).value;
      store.saveSettings(localStorage, state.settings);
    });
  }
  $("key").addEventListener("change", () => { state.key = $("key").value; connect(); });
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("adjust").addEventListener("click", () => toggle($("settings"), $("adjust")));
  $("menu").addEventListener("click", () => {
    const shown = $("side").classList.toggle("open");
    $("menu").setAttribute("aria-expanded", String(shown));
  });
  $("theme").addEventListener("click", () => {
    state.settings.theme = isDark() ? "light" : "dark";
    store.saveSettings(localStorage, state.settings);
    showTheme();
  });
  $("new").addEventListener("click", begin);
  $("stop").addEventListener("click", () => state.controller?.abort());
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("ask").value;
    const shown = state.attached;
    if ((!text.trim() && !shown.length) || state.controller) return;
    $("ask").value = "";
    state.attached = [];
    showAttached();
    grow();
    pictures.keep(shown);
    ask(text, shown);
  });
  $("ask").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("form").requestSubmit();
    }
  });
  $("ask").addEventListener("input", grow);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") state.controller?.abort();
  });
}

function grow() {
  const lines = $("ask").value.split("\n").length;
  $("ask").rows = Math.min(Math.max(lines, 1), 12);
}

function toggle(panel, by) {
  panel.hidden = !panel.hidden;
  by.setAttribute("aria-expanded", String(!panel.hidden));
}

function isDark() {
  const { theme } = state.settings;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function showTheme() {
  document.documentElement.dataset.theme = state.settings.theme;
  $("theme").textContent = isDark() ? "Light" : "Dark";
}

async function connect() {
  try {
    const health = await (await fetch("health")).json();
    state.model = health.model;
    state.chats = health.chat;
    state.most = health.pictures;
    state.maxBody = health.max_body;
    $("attach").hidden = !health.pictures;
    $("model").textContent = health.model;
    document.title = `${health.model} - dsjax`;
    $("key-label").hidden = !health.key;
    if (health.status !== "ready") {
      say(`The server is ${health.status}. ${health.progress || ""}`);
      setTimeout(connect, 1000);
    } else if (!health.chat) say("This is a base model: it continues what you write.");
    else if (health.key && !state.key) say("Give your key in the settings.");
    else say("");
  } catch (error) {
    say("The server does not answer.");
    setTimeout(connect, 3000);
  }
}

setUp();
setUpPictures();
showTheme();
begin();
connect();
