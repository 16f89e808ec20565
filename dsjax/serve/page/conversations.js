// Conversations, kept in this browser alone.
//
// A conversation: {id, title, turns}. A turn: {role, content, pictures?, thought?, seconds?, fault?},
// where pictures are as in pictures.js, and seconds is how long the thought took.

const KEY = "dsjax.conversations";
const SETTINGS = "dsjax.settings";
const MOST = 200;
const LONGEST = 256; // tokens by which a base model continues a text

export const DEFAULTS = { system: "", temperature: "", seed: "", most: "", thinking: "", theme: "" };

export function load(storage) {
  const found = read(storage, KEY);
  if (!Array.isArray(found)) return [];
  return found.filter((each) => each && typeof each.id === "string" && Array.isArray(each.turns));
}

export function save(storage, conversations) {
  let kept = conversations.filter((each) => each.turns.length).slice(0, MOST);
  while (true) {
    try {
      storage.setItem(KEY, JSON.stringify(kept));
      return kept.length;
    } catch (error) {
      if (!kept.length) return 0; // the browser keeps nothing
      kept = kept.slice(0, Math.floor(kept.length / 2)); // full: the oldest go
    }
  }
}

export function loadSettings(storage) {
  const found = read(storage, SETTINGS);
  return { ...DEFAULTS, ...(found && typeof found === "object" ? found : {}) };
}

export function saveSettings(storage, settings) {
  try {
    storage.setItem(SETTINGS, JSON.stringify(settings));
  } catch (error) { /* they last as long as the page */ }
}

function read(storage, key) {
  try {
    return JSON.parse(storage.getItem(key));
  } catch (error) {
    return null;
  }
}

export function create(random) {
  return { id: random(), title: "New conversation", turns: [] };
}

export function title(turns) {
  const first = turns.find((turn) => turn.role === "user");
  const text = first ? first.content.trim().replace(/\s+/g, " ") : "";
  const blank = first?.pictures?.length ? "Picture" : "New conversation";
  return text.length > 60 ? `${text.slice(0, 57)}...` : text || blank;
}

// The body of the request that asks for the next turn. A base model continues the last text.
// `urls` has the pictures by id.
export function body(turns, settings, model, chats, urls = new Map()) {
  const asked = { model, stream: true, stream_options: { include_usage: true } };
  if (settings.temperature !== "") asked.temperature = Number(settings.temperature);
  if (settings.seed !== "") asked.seed = Math.trunc(Number(settings.seed));
  if (settings.most !== "") asked.max_tokens = Math.trunc(Number(settings.most));
  if (!chats) return { max_tokens: LONGEST, ...asked, prompt: turns[turns.length - 1].content };
  if (settings.thinking) asked.thinking = { type: settings.thinking };
  const messages = turns
    .filter((turn) => turn.content || turn.role === "user")
    .map((turn) => ({ role: turn.role, content: parts(turn, urls) }));
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  return { ...asked, messages };
}

function parts({ content, pictures }, urls) {
  if (!pictures?.length) return content;
  const shown = pictures.map(({ id }) => ({ type: "image_url", image_url: { url: urls.get(id) } }));
  return content ? [...shown, { type: "text", text: content }] : shown;
}

// The ids of all pictures of some turns.
export function pictureIds(turns) {
  return turns.flatMap((turn) => (turn.pictures || []).map(({ id }) => id));
}

// Splits a stream of text into the data of server-sent events.
export function eventReader() {
  let held = "";
  return (text) => {
    const parts = (held + text).split(/\r?\n\r?\n/);
    held = parts.pop();
    return parts
      .flatMap((part) => part.split(/\r?\n/))
      .filter((line) => line.startsWith("data:"))
      .map((line) => line.slice(5).trim());
  };
}

export function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}
