// The conversation: settings to a request, events to text, figures under each answer.

import { ApiError, events } from "./api.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const KEPT = ["system", "stops", "schema", ...NUMBERS];

let history = [];
let running = null; // AbortController of the answer under way

export const busy = () => running !== null;
export const stop = () => running?.abort();

export function restoreSettings() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem("septet.settings")) || {};
  } catch {
    localStorage.removeItem("septet.settings"); // of another version, or damaged
  }
  for (const id of KEPT) {
    if (typeof kept[id] === "string") $(id).value = kept[id];
    $(id).addEventListener("change", () => {
      localStorage.setItem("septet.settings", JSON.stringify(Object.fromEntries(KEPT.map((i) => [i, $(i).value]))));
    });
  }
}

function body(model) {
  const asked = { model, stream: true, stream_options: { include_usage: true } };
  for (const id of NUMBERS) if ($(id).value !== "") asked[id] = Number($(id).value);
  const stops = $("stops").value.split("\n").filter(Boolean);
  if (stops.length) asked.stop = stops;
  const schema = $("schema").value.trim();
  if (schema) {
    let parsed;
    try {
      parsed = JSON.parse(schema);
    } catch (error) {
      throw new Error(`the JSON schema in the settings is not JSON: ${error.message}`);
    }
    asked.response_format = { type: "json_schema", json_schema: { name: "answer", schema: parsed } };
  }
  const system = $("system").value.trim();
  asked.messages = [...(system ? [{ role: "system", content: system }] : []), ...history];
  return asked;
}

function element(name, className, text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

// Text with its fenced code as blocks; built from nodes, so that no text of a model is ever HTML.
function show(target, text) {
  const parts = text.split(/^```[^\n]*\n?/m);
  if (parts.length === 1) {
    if (target.firstChild?.nodeType === Node.TEXT_NODE && target.childNodes.length === 1) target.firstChild.data = text;
    else target.textContent = text;
    return;
  }
  target.replaceChildren(...parts.map((part, i) => (i % 2 ? element("pre", "", part.replace(/\n$/, "")) : document.createTextNode(part))));
}

function bubble(role) {
  const made = element("article", role);
  made.append(element("div", "text"));
  $("messages").append(made);
  return made;
}

function facts(times, usage, reason) {
  const told = [];
  if (times.first) told.push(`TTFT ${((times.first - times.asked) / 1000).toFixed(2)} s`);
  const n = usage?.completion_tokens;
  if (n > 1 && times.last > times.first) told.push(`${((1000 * (n - 1)) / (times.last - times.first)).toFixed(1)} tokens/s`);
  if (n !== undefined) told.push(`${n} tokens`);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (usage) told.push(`${cached ?? 0} of ${usage.prompt_tokens} prompt tokens cached`);
  if (reason) told.push({ length: "cut at max tokens", stop: "finished", stopped: "stopped" }[reason] || reason);
  return told.join(" · ");
}

export async function ask(text, model) {
  history.push({ role: "user", content: text });
  $("empty").hidden = true;
  bubble("user").firstChild.textContent = text;
  const article = bubble("assistant running");
  const target = article.firstChild;
  const list = $("messages");
  list.scrollTop = list.scrollHeight;
  const times = { asked: performance.now(), first: 0, last: 0 };
  let answer = "", thoughts = "", usage = null, reason = "";
  running = new AbortController();
  try {
    for await (const event of events("/v1/chat/completions", body(model), running.signal)) {
      if (event.error) throw new Error(event.error.message || event.error);
      usage = event.usage || usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      reason = choice.finish_reason || reason;
      const thought = choice.delta?.reasoning || "";
      if (!choice.delta?.content && !thought) continue;
      times.last = performance.now();
      times.first ||= times.last;
      const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
      if (thought) think(article, (thoughts += thought));
      if (choice.delta.content) show(target, (answer += choice.delta.content));
      if (atEnd) list.scrollTop = list.scrollHeight;
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else fail(article, error);
  } finally {
    running = null;
    article.classList.remove("running");
  }
  if (answer) history.push({ role: "assistant", content: answer });
  else history.pop(); // what got no answer is not part of the conversation
  const told = facts(times, usage, reason);
  if (told) article.append(element("p", "facts", told));
  list.scrollTop = list.scrollHeight;
}

function think(article, text) {
  let box = article.querySelector("details");
  if (!box) {
    box = element("details", "thoughts");
    box.append(element("summary", "", "Thoughts"), element("div"));
    article.prepend(box);
  }
  box.lastChild.textContent = text;
}

function fail(article, error) {
  const offline = error instanceof TypeError ? "the server can't be reached" : error.message;
  article.append(element("p", "error", offline));
  if (error instanceof ApiError && error.status === 401) document.dispatchEvent(new Event("septet:key"));
}

export function forget() {
  stop();
  history = [];
  for (const article of $("messages").querySelectorAll("article")) article.remove();
  $("empty").hidden = false;
}
