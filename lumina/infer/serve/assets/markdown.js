// Markdown to DOM nodes. What a model says is never markup: every character of it ends up in a text node or, for links
// of known schemes, in an href. HTML in it is shown as the text that it is. Images are not loaded: they would tell
// another server that this was read.
//
// markdown-it (15.0.3 looked at) is not used: 119 kB unminified for a parser that fills half of this file, and its tokens
// would still need all of the rendering below. Its own renderer makes strings of HTML, which the page's policy refuses.
//
// Understood: paragraphs, headings, fenced code, lists, quotes, rules, tables; code, bold, italic, struck, links.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
// `s`: without it a dot stops at U+2028, and the search begins again at each space before.
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/s;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])\s+(.*)$/s;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^[ :|-]*$/; // with a - in it
const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const DEEPEST = 6; // quotes in lists in quotes, and so on: deeper ones stay text

/** Not by spreading: a call takes some 100,000 arguments. */
function make(name, children = []) {
  const node = document.createElement(name);
  for (const child of children) node.append(child);
  return node;
}

/** The nodes of a text, complete or still growing. */
export function render(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function blocks(lines, depth) {
  const out = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) {
      at += 1;
      continue;
    }
    const taken = depth < DEEPEST ? special(lines, at, depth) : null;
    const [node, next] = taken ?? paragraph(lines, at, depth);
    out.push(node);
    at = next;
  }
  return out;
}

/** [node, index of the line after it] of a block that is not a paragraph, or null. */
function special(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    // The page's own headings are h1 and h2.
    const level = Math.min(6, heading[1].length + 2);
    return [make("h" + level, inline(withoutClosing(heading[2]))), at + 1];
  }
  if (RULE.test(line)) return [make("hr"), at + 1];
  if (QUOTE.test(line)) {
    const end = stretch(lines, at, (other) => QUOTE.test(other));
    return [make("blockquote", blocks(lines.slice(at, end).map((other) => other.replace(QUOTE, "")), depth + 1)), end];
  }
  if (ITEM.test(line)) return list(lines, at, depth);
  if (line.includes("|") && at + 1 < lines.length && lines[at + 1].includes("|") && lines[at + 1].includes("-") &&
      TABLE_RULE.test(lines[at + 1])) {
    return table(lines, at);
  }
  return null;
}

/** A heading without the signs that may end it. */
function withoutClosing(text) {
  const whole = text.trimEnd();
  const short = whole.slice(0, whole.length - /#*$/.exec(whole.slice(-100))[0].length);
  return short.length < whole.length && /\s$/.test(short) ? short.trimEnd() : text;
}

function stretch(lines, at, belongs) {
  let end = at + 1;
  while (end < lines.length && belongs(lines[end])) end += 1;
  return end;
}

function paragraph(lines, at, depth) {
  const ends = (line, index) => !line.trim() || (depth < DEEPEST && special(lines, index, DEEPEST - 1) !== null);
  let end = at + 1;
  while (end < lines.length && !ends(lines[end], end)) end += 1;
  return [make("p", inline(lines.slice(at, end).join("\n"))), end];
}

function code(lines, at, fence) {
  const closes = (line) => line.trim().startsWith(fence[1]) && !line.trim().slice(fence[1].length).replaceAll(fence[1][0], "");
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end += 1;
  const block = make("pre", [make("code", [lines.slice(at + 1, end).join("\n")])]);
  block.tabIndex = 0; // it scrolls, so the keyboard must reach it
  if (fence[2]) block.dataset.language = fence[2];
  return [block, Math.min(end + 1, lines.length)];
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first[2]);
  const whole = make(ordered ? "ol" : "ul");
  if (ordered && Number.parseInt(first[2], 10) !== 1) whole.start = Number.parseInt(first[2], 10);
  let index = at;
  while (index < lines.length) {
    const item = ITEM.exec(lines[index]);
    if (!item || item[1].length !== first[1].length || /\d/.test(item[2]) !== ordered || RULE.test(lines[index])) break;
    const indent = item[1].length + 2;
    const inside = (line) => !line.trim() || line.search(/\S/) >= indent;
    let end = stretch(lines, index, inside);
    while (!lines[end - 1].trim()) end -= 1;
    const rest = lines.slice(index + 1, end);
    const least = rest.reduce((found, line) => (line.trim() ? Math.min(found, line.search(/\S/)) : found), 99);
    const content = blocks([item[3], ...rest.map((line) => line.slice(least))], depth + 1);
    const lone = content[0]?.tagName === "P" ? content.shift() : null;
    whole.append(make("li", [...(lone ? lone.childNodes : []), ...content]));
    index = end;
    while (index < lines.length && !lines[index].trim() && ITEM.test(lines[index + 1] ?? "")) index += 1;
  }
  return [whole, index];
}

function table(lines, at) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));
  const row = (line, kind) => make("tr", cells(line).map((content) => make(kind, content)));
  const end = stretch(lines, at + 1, (line) => line.includes("|"));
  const body = lines.slice(at + 2, end).map((line) => row(line, "td"));
  const whole = make("table", [make("thead", [row(lines[at], "th")]), make("tbody", body)]);
  whole.tabIndex = 0;
  return [whole, end];
}

const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

/** The nodes of a run of text. Left to right; what does not close is text. `open`: marks that nothing closes from here on,
 * for which the rest of the text is not searched again: each is looked for once, and the work grows with the text alone. */
function inline(text, depth = 0) {
  const out = [];
  const open = new Set();
  let plain = "";
  const flush = () => {
    if (plain) out.push(document.createTextNode(plain));
    plain = "";
  };
  for (let at = 0; at < text.length; ) {
    const found = depth < DEEPEST ? span(text, at, depth, open) : null;
    if (found) {
      flush();
      out.push(found[0]);
      at = found[1];
    } else if (text[at] === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else {
      plain += text[at];
      at += 1;
    }
  }
  flush();
  return out;
}

/** [node, index after it] of what begins at `at`, or null. */
function span(text, at, depth, open) {
  const letter = text[at];
  if (letter === "`") {
    const ticks = /^`+/.exec(text.slice(at, at + 20))[0];
    const end = open.has(ticks) ? -1 : text.indexOf(ticks, at + ticks.length);
    if (end < 0) open.add(ticks);
    return end > 0 ? [make("code", [text.slice(at + ticks.length, end)]), end + ticks.length] : null;
  }
  if (letter === "[" || (letter === "!" && text[at + 1] === "[")) return link(text, at, depth);
  if (!"*_~".includes(letter)) return null;
  const inWord = (index) => /[\p{L}\p{N}]/u.test(text[index] ?? "");
  for (const [mark, name] of MARKS) {
    if (open.has(mark) || !text.startsWith(mark, at) || /\s/.test(text[at + mark.length] ?? " ")) continue;
    if (letter === "_" && inWord(at - 1)) continue; // snake_case
    let end = text.indexOf(mark, at + mark.length + 1);
    while (end > 0 && (/\s/.test(text[end - 1]) || (letter === "_" && inWord(end + mark.length)))) {
      end = text.indexOf(mark, end + 1);
    }
    if (end > 0) return [make(name, inline(text.slice(at + mark.length, end), depth + 1)), end + mark.length];
    open.add(mark);
  }
  return null;
}

function link(text, at, depth) {
  const found = /^!?\[([^\]\n]{0,500})\]\(\s*<?([^\s()<>]{1,2000})>?(?:\s+"[^"\n]*")?\s*\)/.exec(text.slice(at, at + 2600));
  if (!found) return null;
  const label = found[1] ? inline(found[1], depth + 1) : [found[2]];
  let url = null;
  try {
    url = new URL(found[2]);
  } catch {
    // A relative address would be one of this server.
  }
  if (!url || !SCHEMES.has(url.protocol)) return [make("span", [...label, ` (${found[2]})`]), at + found[0].length];
  const node = make("a", label);
  node.href = url.href;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  node.title = url.href;
  return [node, at + found[0].length];
}
