// The chat page: a conversation with the model behind /v1/chat/completions.

import { render } from "/markdown.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const KEPT = [...NUMBERS, "system", "stop_text", "tools"]; // kept for the next visit; the key only as long as the tab
// {role, content, ending}, of the model's also reasoning and calls {id, name, arguments}; a tool's result has its call
let messages = [];
let running = null; // the AbortController of the answer that is being made
let room = null; // the model's context length in tokens
let perLetter = 0.3; // tokens; from the last answer's account

// --- the conversation ----------------------------------------------------------------------------

function button(text, label, act) {
  const node = document.createElement("button");
  node.type = "button";
  node.textContent = text;
  node.setAttribute("aria-label", label);
  node.disabled = Boolean(running);
  node.addEventListener("click", act);
  return node;
}

function show() {
  const inside = document.activeElement?.closest("article"); // it is about to go, and the focus with it
  $("empty").hidden = messages.length > 0;
  for (const old of document.querySelectorAll("#log > article, #log > .note")) old.remove();
  messages.forEach((message, index) => $("log").append(article(message, index)));
  if (inside) $("input").focus();
  $("log").scrollTop = $("log").scrollHeight;
}

function article(message, index) {
  const node = document.createElement("article");
  node.className = message.role;
  const title = document.createElement("h2");
  title.textContent = { user: "You", tool: `Result of ${message.call?.name}` }[message.role] ?? "Model";
  const body = document.createElement("div");
  body.className = "body";
  const actions = document.createElement("div");
  actions.className = "actions";
  node.append(title, body, actions);
  fill(body, message);
  if (message.ending) {
    const ending = document.createElement("p");
    ending.className = "ending";
    ending.textContent = message.ending;
    body.after(ending);
  }
  const last = index === messages.length - 1;
  if (message.role === "user") {
    actions.append(button("Edit", "Edit this message", () => edit(node, message, index)));
    if (last && !running) actions.append(button("Try again", "Ask for an answer again", answer));
  } else if (message.role === "tool") {
    if (last && !running) actions.append(button("Try again", "Ask for an answer again", answer));
  } else {
    actions.append(button("Copy", "Copy this answer", () => copy(message)));
    if (last) actions.append(button("Regenerate", "Make this answer again", regenerate));
    if (last && !running && message.calls.length) node.append(results(message));
  }
  return node;
}

/** Not by spreading: a call takes some 100,000 arguments. */
function replace(body, nodes) {
  const whole = document.createDocumentFragment();
  for (const node of nodes) whole.append(node);
  body.replaceChildren(whole);
}

function fill(body, message) {
  if (message.role === "assistant") {
    replace(body, [...reasoning(message, body), ...render(message.content), ...message.calls.map(call)]);
  } else if (message.role === "tool") body.textContent = message.content; // as the tool wrote it
  else replace(body, render(message.content));
}

const BLOCKS = "p, h3, h4, h5, h6, ul, ol, li, blockquote, pre, pre > code";

/** Marks where the answer grows: the end of its last line, however deep in lists and quotes that is. */
function caret(body) {
  body.classList.remove("caret");
  let last = body;
  while (last.lastElementChild?.matches(BLOCKS) && !after(last.lastElementChild)) last = last.lastElementChild;
  last.classList.add("caret");
}

/** Whether text follows a node in its parent. */
function after(node) {
  return Boolean(node.nextSibling?.textContent.trim());
}

/** Folded away, or open as the reader has left it. All of it is text, never markup. */
function reasoning(message, body) {
  if (!message.reasoning) return [];
  const node = document.createElement("details");
  node.className = "reasoning";
  const before = body.querySelector("details.reasoning");
  node.open = before ? before.open : false;
  const title = document.createElement("summary");
  title.textContent = "Reasoning";
  const text = document.createElement("div");
  text.textContent = message.reasoning;
  node.append(title, text);
  return [node];
}

function call({ name, arguments: text }) {
  const node = document.createElement("p");
  node.className = "call";
  const code = document.createElement("code");
  code.textContent = `${name}(${text})`;
  node.append("Calls ", code);
  return node;
}

/** A field for the result of each call, sent to the model together. */
function results(message) {
  const form = document.createElement("form");
  form.className = "results";
  const fields = message.calls.map((called) => {
    const label = document.createElement("label");
    const area = document.createElement("textarea");
    area.rows = 2;
    area.placeholder = "What the tool gives back: text or JSON";
    area.addEventListener("keydown", (event) => {
      if (sends(event)) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    const code = document.createElement("code");
    code.textContent = `${called.name}(${called.arguments})`;
    label.append("Result of ", code, area);
    form.append(label);
    return area;
  });
  const actions = document.createElement("div");
  actions.className = "actions";
  const save = document.createElement("button");
  save.type = "submit";
  save.textContent = message.calls.length > 1 ? "Send results" : "Send result";
  actions.append(save);
  form.append(actions);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const empty = fields.find((area) => !area.value.trim());
    if (running || empty) {
      empty?.focus();
      return;
    }
    messages.push(...message.calls.map((made, at) => ({ role: "tool", content: fields[at].value, call: made })));
    answer();
  });
  return form;
}

async function copy(message) {
  try {
    await navigator.clipboard.writeText(message.content);
    tell("Copied.");
  } catch {
    complain("The browser does not allow copying.");
  }
}

function edit(node, message, index) {
  if (running) return;
  const form = document.createElement("form");
  const area = document.createElement("textarea");
  area.value = message.content;
  area.rows = Math.min(12, message.content.split("\n").length + 1);
  area.setAttribute("aria-label", "Your message");
  const save = document.createElement("button");
  save.type = "submit";
  save.textContent = "Send";
  const actions = document.createElement("div");
  actions.className = "actions";
  actions.append(save, button("Cancel", "Leave the message as it was", show));
  form.append(area, actions);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!area.value.trim()) return;
    messages = [...messages.slice(0, index), { role: "user", content: area.value }];
    answer();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show();
    if (sends(event)) form.requestSubmit();
  });
  node.replaceChildren(form);
  area.focus();
}

function regenerate() {
  if (running || messages.at(-1)?.role !== "assistant") return;
  messages.pop();
  answer();
}

// --- an answer -----------------------------------------------------------------------------------

/** Whole turns from the oldest on are left out until the rest and an answer fit the context, as `lumina chat` does. */
function fitting(skip) {
  const most = room ? room - Math.min(Number($("max_tokens").value) || 512, room / 2) : Infinity;
  const size = (kept) => kept.reduce((sum, m) => sum + 4 + letters(m) * perLetter, asides() * perLetter);
  while (skip < messages.length - 1 && size(messages.slice(skip)) > most) skip = turnAfter(skip);
  return skip;
}

/** Characters that the model reads of a message, and of what stands before all messages. */
function letters({ content, calls = [] }) {
  return content.length + calls.reduce((sum, made) => sum + made.name.length + made.arguments.length, 0);
}

function asides() {
  return $("system").value.length + $("tools").value.length;
}

function turnAfter(skip) {
  const next = messages.findIndex((message, index) => index > skip && message.role === "user");
  return next < 0 ? messages.length - 1 : next;
}

function request(skip) {
  const kept = messages.slice(skip);
  const body = { messages: kept.map((message, at) => sent(message, kept[at + 1])), stream: true };
  const declared = tools();
  if (declared.length) body.tools = declared;
  if ($("system").value.trim()) body.messages.unshift({ role: "system", content: $("system").value });
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  if ($("stop_text").value) body.stop = [$("stop_text").value];
  return { ...body, stream_options: { include_usage: true } };
}

/** A message as the server takes it back. Calls go with it where results follow: without them nothing answers them. */
function sent({ role, content, reasoning: thought, calls, call: made }, next) {
  if (role === "tool") return { role, content, tool_call_id: made.id };
  const answered = next?.role === "tool" ? calls : [];
  return {
    role,
    content,
    ...(thought ? { reasoning_content: thought } : {}),
    ...(answered.length ? { tool_calls: answered.map(({ id, ...called }) => ({ id, type: "function", function: called })) } : {}),
  };
}

/** The functions that the model may call: OpenAI's form, or the functions alone. Throws where they are no such list. */
function tools() {
  const text = $("tools").value.trim();
  if (!text) return [];
  let list;
  try {
    list = JSON.parse(text);
  } catch (error) {
    throw new Error(`The tools in Settings are no JSON: ${error.message}`);
  }
  list = Array.isArray(list) ? list : [list];
  if (list.some((tool) => typeof (tool?.function ?? tool)?.name !== "string")) {
    throw new Error("The tools in Settings are a list of functions, each with a name, a description and parameters.");
  }
  return list.map((tool) => (tool.function ? tool : { type: "function", function: tool }));
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function answer() {
  complain("");
  const asked = messages; // another array once a new conversation begins
  const said = { role: "assistant", content: "", reasoning: "", calls: [], ending: "" };
  busy(new AbortController());
  show();
  const node = article(said, -1);
  node.setAttribute("aria-busy", "true");
  caret(node.querySelector(".body"));
  node.querySelector(".actions").remove();
  $("log").append(node);
  $("log").scrollTop = $("log").scrollHeight;
  tell("The model is answering.");
  try {
    await ask(said, node, fitting(0));
    node.removeAttribute("aria-busy");
    fill(node.querySelector(".body"), said);
    tell(`${node.querySelector(".body").textContent} ${said.ending}`); // for those who listen
  } catch (error) {
    if (error.name === "AbortError") {
      said.ending = "Stopped.";
      tell("Stopped.");
    } else {
      said.ending = said.content || said.reasoning ? "Cut off by an error." : "";
      complain(error.message);
    }
  }
  busy(null);
  if (messages !== asked) return;
  const note = document.querySelector("#log > .note");
  if (said.content || said.reasoning || said.calls.length || said.ending) messages.push(said);
  show();
  if (note) $("log").lastElementChild.before(note);
  if (said.calls.length && document.activeElement === $("input") && !$("input").value) {
    document.querySelector("form.results textarea")?.focus();
  }
}

async function ask(said, node, skip) {
  const signal = running.signal;
  const response = await fetch("/v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(request(skip)), signal,
  });
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({ error: { message: `The server answered ${response.status}.` } }));
    if (error.code === "context_length_exceeded" && skip < messages.length - 1) return ask(said, node, turnAfter(skip));
    if (response.status === 401) $("settings").showModal();
    throw new Error(error.message);
  }
  if (skip > 0) {
    const note = document.createElement("p");
    note.className = "note";
    note.textContent = `The context is full: the answer sees only the last ${messages.length - skip} of ${messages.length} messages.`;
    node.before(note);
  }
  await listen(response, said, node, skip);
}

async function listen(response, said, node, skip) {
  const body = node.querySelector(".body");
  let planned = false;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) {
      const read = messages.slice(skip).reduce((sum, m) => sum + letters(m), asides());
      perLetter = Math.max(0.05, event.usage.prompt_tokens / Math.max(1, read));
    }
    const choice = event.choices?.[0];
    if (!choice) continue;
    said.content += choice.delta.content ?? "";
    said.reasoning += choice.delta.reasoning_content ?? "";
    for (const { id, function: called } of choice.delta.tool_calls ?? []) said.calls.push({ id, ...called });
    if (choice.finish_reason === "length") said.ending = "Cut off: the longest answer, or the model's context, is reached.";
    if (!planned) { // once a frame, however fast the words come
      planned = true;
      requestAnimationFrame(() => {
        planned = false;
        const log = $("log");
        const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
        fill(body, said);
        if (node.getAttribute("aria-busy")) caret(body);
        if (follows) log.scrollTop = log.scrollHeight;
      });
    }
  }
}

/** The JSON of server-sent events, up to [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection ended before the answer did.");
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}

// --- the rest of the page ------------------------------------------------------------------------

function busy(controller) {
  running = controller;
  $("stop").hidden = !controller;
  $("send").hidden = Boolean(controller);
}

function tell(text) {
  $("status").textContent = text;
}

function complain(text) {
  $("alert").textContent = text;
  $("alert").hidden = !text;
}

function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight + 2}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value;
  if (running || !text.trim()) return;
  messages.push({ role: "user", content: text });
  $("input").value = "";
  grow();
  $("input").focus();
  answer();
});
$("input").addEventListener("keydown", (event) => {
  if (sends(event)) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("input").addEventListener("input", grow);
$("stop").addEventListener("click", () => {
  running?.abort();
  $("input").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("settings").open) running?.abort();
});
$("new").addEventListener("click", () => {
  running?.abort();
  busy(null);
  messages = [];
  complain("");
  show();
  $("input").focus();
});

const first = Object.fromEntries(KEPT.map((name) => [name, $(name).value]));

function settle(values) {
  for (const name of KEPT) if (typeof values[name] === "string") $(name).value = values[name];
}

function keep() {
  localStorage.setItem("lumina-settings", JSON.stringify(Object.fromEntries(KEPT.map((name) => [name, $(name).value]))));
  sessionStorage.setItem("lumina-key", $("key").value);
}

$("open-settings").addEventListener("click", () => $("settings").showModal());
$("reset-settings").addEventListener("click", () => {
  settle(first);
  bound();
});
$("settings").addEventListener("close", () => {
  bound();
  keep();
  try {
    tools();
    complain("");
  } catch (error) {
    complain(error.message);
  }
  if (!room) about();
});

/** The longest answer within what the server and the model's context allow. */
function bound() {
  const field = $("max_tokens");
  if (field.value && Number(field.value) > Number(field.max)) field.value = field.max;
}

async function about() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (response.status === 401) {
    complain("This server asks for an API key: Settings takes it.");
    return;
  }
  const model = (await response.json()).data[0];
  $("model").textContent = model.id;
  document.title = `${model.id} – Lumina`;
  room = model.max_model_len;
  $("max_tokens").max = Math.min(model.max_tokens, room); // no answer is longer than the context
  $("most").textContent = `tokens, to ${$("max_tokens").max}`;
  bound();
  complain("");
}

try {
  settle(JSON.parse(localStorage.getItem("lumina-settings") ?? "{}"));
  $("key").value = sessionStorage.getItem("lumina-key") ?? "";
} catch {
  // Damaged settings are as good as none.
}
about().catch(() => complain("The server does not answer."));
