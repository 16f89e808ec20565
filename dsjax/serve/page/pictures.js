// Pictures of messages: read from files, and kept in this browser alone, in a database, since what
// keeps the texts has no room for them.
//
// A picture: {id, name, url}, where url is the picture itself (data:image/png;base64,...). A turn
// keeps {id, name}; the rest is found by id.

const NAME = "dsjax";
const STORE = "pictures";
const MOST_PIXELS = 64_000_000; // that the server decodes
export const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

// Reads a file; throws what is wrong with it.
export async function read(file, random) {
  if (!KINDS.includes(file.type)) throw new Error(`${file.name} is no PNG, JPEG, WebP, GIF or BMP picture.`);
  const { width, height } = await size(file);
  if (width * height > MOST_PIXELS) {
    throw new Error(`${file.name} has ${width} x ${height} pixels; at most 64 million are read.`);
  }
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
  return { id: random(), name: file.name, url };
}

async function size(file) {
  try {
    const bitmap = await createImageBitmap(file);
    const found = { width: bitmap.width, height: bitmap.height };
    bitmap.close();
    return found;
  } catch (error) {
    throw new Error(`${file.name} is damaged, or no picture.`);
  }
}

// The pictures that a transfer, of the clipboard or of something dropped, holds as files.
export function files(transfer) {
  return [...(transfer?.files || [])].filter((file) => file.type.startsWith("image/"));
}

export async function keep(pictures) {
  await inStore("readwrite", (store) => pictures.map((each) => store.put(each.url, each.id)));
}

// Returns the urls that are there, by id.
export async function load(ids) {
  const urls = await inStore("readonly", (store) => ids.map((id) => store.get(id)));
  return new Map(ids.map((id, index) => [id, urls[index]]).filter(([, url]) => url));
}

export async function forgetAllBut(ids) {
  const [kept] = await inStore("readonly", (store) => [store.getAllKeys()]);
  const gone = (kept || []).filter((id) => !ids.has(id));
  await inStore("readwrite", (store) => gone.map((id) => store.delete(id)));
}

// Runs requests in one transaction and returns their results; none where the browser keeps nothing.
async function inStore(mode, requests) {
  try {
    const base = await opened();
    return await new Promise((resolve, reject) => {
      const transaction = base.transaction(STORE, mode);
      const asked = requests(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(asked.map((each) => each.result));
      transaction.onabort = () => reject(transaction.error);
    }).finally(() => base.close());
  } catch (error) {
    return [];
  }
}

function opened() {
  return new Promise((resolve, reject) => {
    const asked = indexedDB.open(NAME, 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore(STORE);
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}
