// A subset of Markdown as a tree, and the tree as elements. Text becomes text nodes and nothing
// else, so whatever a model writes, no element comes of it but those that are made here.
//
// Blocks: paragraphs, # headings, fenced code, lists, > quotes, tables, rules, mathematics.
// Inline: `code`, **strong**, *emphasis*, [links](https://...), \( mathematics \).

const SAFE_LINK = /^(https?:\/\/|mailto:)/i;
const MOST_DEPTH = 8;

export function parse(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function blocks(lines, depth) {
  const found = [];
  let at = 0;
  const paragraph = [];
  const close = () => {
    if (paragraph.length) found.push({ kind: "p", inline: inline(paragraph.splice(0).join("\n")) });
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/.exec(line);
    const heading = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/.exec(line);
    const math = mathAt(lines, at);
    if (fence) {
      close();
      const end = closing(lines, at + 1, fence[1]);
      const code = lines.slice(at + 1, end).join("\n");
      found.push({ kind: "code", language: fence[2].trim().split(/\s/)[0], text: code });
      at = end + 1;
    } else if (math) {
      close();
      found.push({ kind: "math", text: math.text });
      at = math.end;
    } else if (heading) {
      close();
      found.push({ kind: "h", level: heading[1].length, inline: inline(heading[2]) });
      at += 1;
    } else if (/^ {0,3}([-*_])( *\1){2,} *$/.test(line)) {
      close();
      found.push({ kind: "hr" });
      at += 1;
    } else if (/^ {0,3}>/.test(line) && depth < MOST_DEPTH) {
      close();
      const end = run(lines, at, (each) => /^ {0,3}>/.test(each));
      const inner = lines.slice(at, end).map((each) => each.replace(/^ {0,3}> ?/, ""));
      found.push({ kind: "quote", blocks: blocks(inner, depth + 1) });
      at = end;
    } else if (marker(line) && depth < MOST_DEPTH) {
      close();
      const list = listAt(lines, at, depth);
      found.push(list.block);
      at = list.end;
    } else if (isTable(lines, at)) {
      close();
      const end = run(lines, at + 2, (each) => each.includes("|"));
      const rows = lines.slice(at + 2, end).map(cells);
      found.push({ kind: "table", head: cells(line), rows });
      at = end;
    } else {
      if (line.trim()) paragraph.push(line.trim());
      else close();
      at += 1;
    }
  }
  close();
  return found;
}

function run(lines, start, holds) {
  let end = start;
  while (end < lines.length && holds(lines[end])) end += 1;
  return end;
}

function closing(lines, start, fence) {
  const mark = fence[0] === "`" ? /^ {0,3}`+\s*$/ : /^ {0,3}~+\s*$/;
  return run(lines, start, (each) => !(mark.test(each) && each.trim().length >= fence.length));
}

function mathAt(lines, at) {
  const pairs = [["$$", "$$"], ["\\[", "\\]"]];
  const line = lines[at].trim();
  for (const [open, shut] of pairs) {
    if (!line.startsWith(open)) continue;
    const rest = [line.slice(2), ...lines.slice(at + 1)];
    const last = rest.findIndex((each) => each.includes(shut));
    if (last < 0) return null; // still to come, or never
    const [head, tail] = rest[last].split(shut, 2);
    if (tail.trim()) return null;
    const text = [...rest.slice(0, last), head].join("\n").trim();
    return { text, end: at + last + 1 };
  }
  return null;
}

function marker(line) {
  return /^( *)([-*+]|\d{1,9}[.)])( +)(?=\S)/.exec(line);
}

function listAt(lines, at, depth) {
  const first = marker(lines[at]);
  const indent = first[1].length;
  const ordered = /\d/.test(first[2]);
  const items = [];
  while (at < lines.length) {
    const found = marker(lines[at]);
    if (!found || found[1].length < indent || /\d/.test(found[2]) !== ordered) break;
    const width = found[0].length;
    const inner = [lines[at].slice(width)];
    at += 1;
    while (at < lines.length) {
      const line = lines[at];
      const inside = line.search(/\S/) > indent;
      const next = lines[at + 1];
      const goes = line.trim() === "" && next !== undefined && next.search(/\S/) > indent;
      if (!inside && !goes) break;
      inner.push(line.slice(Math.min(width, Math.max(line.search(/\S/), 0))));
      at += 1;
    }
    items.push(blocks(inner, depth + 1));
    if (at < lines.length - 1 && !lines[at].trim() && marker(lines[at + 1])) at += 1;
  }
  const start = ordered ? parseInt(first[2], 10) : 1;
  return { block: { kind: "list", ordered, start, items }, end: at };
}

function isTable(lines, at) {
  const rule = lines[at + 1];
  return lines[at].includes("|") && rule !== undefined && rule.includes("-")
    && /^\s*\|?(\s*:?-+:?\s*\|)*\s*:?-+:?\s*\|?\s*$/.test(rule);
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split("|").map((cell) => inline(cell.trim()));
}

// Each alternative ends within its own text, and none repeats another's beginning, so the time is
// bounded by the length.
const INLINE = new RegExp([
  "(`+)([^`]|[^`][^]*?[^`])\\1(?!`)", // 1, 2: code
  "\\\\\\(([^]*?)\\\\\\)", // 3: mathematics
  "\\$\\$([^$]+)\\$\\$", // 4
  "\\[([^\\[\\]\\n]+)\\]\\(([^()\\s]+)\\)", // 5, 6: link
  "\\*\\*([^*\\n]+)\\*\\*", // 7: strong
  "\\*([^*\\s][^*\\n]*)\\*", // 8: emphasis
  "\\\\([\\\\`*_{}\\[\\]()#+\\-.!$|~>])", // 9: escaped
].join("|"), "g");

export function inline(text) {
  const found = [];
  let end = 0;
  const plain = (upTo) => {
    if (upTo > end) found.push({ kind: "text", text: text.slice(end, upTo) });
  };
  for (const match of text.matchAll(INLINE)) {
    if (match[6] !== undefined && !SAFE_LINK.test(match[6])) continue; // stays text
    plain(match.index);
    end = match.index + match[0].length;
    if (match[2] !== undefined) found.push({ kind: "code", text: match[2].trim() });
    else if (match[3] !== undefined) found.push({ kind: "math", text: match[3].trim() });
    else if (match[4] !== undefined) found.push({ kind: "math", text: match[4].trim() });
    else if (match[6] !== undefined) {
      found.push({ kind: "link", href: match[6], inline: styled(match[5]) });
    } else if (match[7] !== undefined) found.push({ kind: "strong", inline: styled(match[7]) });
    else if (match[8] !== undefined) found.push({ kind: "em", inline: styled(match[8]) });
    else found.push({ kind: "text", text: match[9] });
  }
  plain(text.length);
  return found;
}

function styled(text) {
  return [{ kind: "text", text }];
}

export function render(tree, document, onCopy) {
  const fragment = document.createDocumentFragment();
  for (const block of tree) fragment.append(element(block, document, onCopy));
  return fragment;
}

function element(block, document, onCopy) {
  const make = (name, ...children) => {
    const made = document.createElement(name);
    made.append(...children);
    return made;
  };
  const within = (parts) => parts.map((part) => inlineNode(part, document, make));
  switch (block.kind) {
    case "p": return make("p", ...within(block.inline));
    case "h": return make(`h${Math.min(block.level + 2, 6)}`, ...within(block.inline));
    case "hr": return make("hr");
    case "math": {
      const made = make("span", block.text);
      made.className = "math block";
      return made;
    }
    case "quote": return make("blockquote", render(block.blocks, document, onCopy));
    case "list": {
      const items = block.items.map((item) => make("li", ...itemNodes(item, document, onCopy)));
      const list = make(block.ordered ? "ol" : "ul", ...items);
      if (block.ordered && block.start !== 1) list.setAttribute("start", String(block.start));
      return list;
    }
    case "table": {
      const row = (name, each) => make("tr", ...each.map((cell) => make(name, ...within(cell))));
      const body = make("tbody", ...block.rows.map((each) => row("td", each)));
      return make("table", make("thead", row("th", block.head)), body);
    }
    default: return codeFigure(block, document, make, onCopy);
  }
}

function itemNodes(item, document, onCopy) {
  const nodes = [...render(item, document, onCopy).childNodes];
  // A tight list's items are not paragraphs.
  if (nodes.length && nodes[0].nodeName === "P") return [...nodes[0].childNodes, ...nodes.slice(1)];
  return nodes;
}

function codeFigure(block, document, make, onCopy) {
  const copy = make("button", "Copy");
  copy.type = "button";
  copy.addEventListener("click", () => onCopy(block.text, copy));
  const caption = make("figcaption", make("span", block.language || "text"), copy);
  const figure = make("figure", caption, make("pre", make("code", block.text)));
  figure.className = "code";
  return figure;
}

function inlineNode(part, document, make) {
  switch (part.kind) {
    case "text": return document.createTextNode(part.text);
    case "code": return make("code", part.text);
    case "math": {
      const made = make("span", part.text);
      made.className = "math";
      return made;
    }
    case "strong": return make("strong", ...part.inline.map((each) => inlineNode(each, document, make)));
    case "em": return make("em", ...part.inline.map((each) => inlineNode(each, document, make)));
    default: {
      const link = make("a", ...part.inline.map((each) => inlineNode(each, document, make)));
      link.setAttribute("href", part.href);
      link.setAttribute("rel", "noopener noreferrer nofollow");
      link.setAttribute("target", "_blank");
      return link;
    }
  }
}
