// The scope: frames of GET /scope to figures and pictures. Watches only while it can be seen.

import { ApiError, events } from "./api.js";
import { batch, curve, pool, tree } from "./draw.js";

const $ = (id) => document.getElementById(id);
const SPAN = 90; // seconds shown
const wait = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

let watching = null; // AbortController
let wanted = "";
let last = null; // the frame before
const seen = { rate: [], prompt: [], ttft: [], tpot: [] }; // [time, value]

const count = (n) => (n >= 1e6 ? `${(n / 1e6).toFixed(1)}M` : n >= 1e4 ? `${(n / 1e3).toFixed(1)}k` : String(Math.round(n)));
const time = (s) => (s >= 1 ? `${s.toFixed(2)} s` : `${(1000 * s).toFixed(s < 0.01 ? 1 : 0)} ms`);
const rate = (v) => `${v >= 100 ? v.toFixed(0) : v.toFixed(1)}/s`;
const middle = (values) => (values.length ? [...values].sort((a, b) => a - b)[values.length >> 1] : null);

function state(words, bad = false) {
  $("scope-state").textContent = words;
  $("scope-state").classList.toggle("bad", bad);
}

export function watch(model) {
  if (model === wanted && watching) return;
  unwatch();
  if (model !== wanted) { last = null; Object.values(seen).forEach((list) => (list.length = 0)); }
  wanted = model;
  watching = new AbortController();
  follow(watching.signal);
}

export function unwatch() {
  watching?.abort();
  watching = null;
}

async function follow(signal) {
  for (let pause = 1; !signal.aborted; pause = Math.min(10, pause * 1.6)) {
    try {
      const path = wanted ? `/scope?model=${encodeURIComponent(wanted)}` : "/scope";
      for await (const frame of events(path, null, signal)) {
        show(frame);
        pause = 1;
      }
      if (!signal.aborted) state("the server closed the scope", true);
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ApiError && error.status === 401) return state("an API key is needed (Settings)", true);
      if (error instanceof ApiError && error.status === 404) state("this model is not loaded; ask it something");
      else state(error instanceof TypeError ? "no connection to the server; trying again" : error.message, true);
    }
    await wait(pause);
  }
}

function show(frame) {
  if (frame.gone) return state("this model is not loaded; ask it something");
  const stuck = frame.pulse && (frame.pulse.silent_s > 3 || frame.pulse.stuck_s > 30);
  if (!frame.stats) return state(stuck ? "the engine does not move" : "in a long step", stuck);
  const e = frame.engine;
  state(`${frame.model} · ${e.device}, ${e.dtype}, ${e.kernels} kernels · context ${count(e.max_model_len)}`);
  learn(frame);
  figures(frame.stats, e);
  curves(frame.time);
  batch($("rows"), frame.rows, frame.more_rows);
  $("batch-note").textContent = `${frame.stats.running} of ${e.max_num_seqs} rows, ${frame.stats.waiting} waiting`;
  pool($("pool"), frame.pool);
  const s = frame.stats, share = (n) => `${((100 * n) / s.slots_total).toFixed(0)} %`;
  $("pool-note").textContent = `${count(s.slots_total)} tokens: ${share(s.slots_leased)} leased, ${share(s.slots_cached)} cached`;
  tree($("tree"), frame.tree);
  $("tree-note").textContent = s.prompt_tokens ? `${((100 * s.cached_tokens) / s.prompt_tokens).toFixed(0)} % of prompt tokens came from here` : "";
  document.body.dataset.frames = Number(document.body.dataset.frames || 0) + 1;
  last = frame;
}

function learn(frame) {
  const old = frame.time - SPAN;
  if (last && frame.time > last.time) {
    const seconds = frame.time - last.time, grown = (name) => Math.max(0, frame.stats[name] - last.stats[name]) / seconds;
    seen.rate.push([frame.time, grown("generated_tokens")]);
    seen.prompt.push([frame.time, grown("computed_tokens") - grown("generated_tokens")]);
  }
  for (const name of ["ttft", "tpot"]) for (const value of frame[name] || []) seen[name].push([frame.time, value]);
  for (const list of Object.values(seen)) while (list.length && list[0][0] < old) list.shift();
}

// Steps of a CPU are longer than a frame: the mean of the last second and a half says more.
function smooth(list) {
  return list.map(([at], i) => {
    const near = list.slice(Math.max(0, i - 5), i + 1);
    return [at, near.reduce((sum, p) => sum + p[1], 0) / near.length];
  });
}

function curves(now) {
  const ago = (list) => list.map(([at, value]) => [now - at, value]);
  const rates = smooth(seen.rate);
  curve($("curve-rate"), ago(rates), { span: SPAN, unit: rate });
  curve($("curve-ttft"), ago(seen.ttft), { span: SPAN, unit: time, dots: true });
  curve($("curve-tpot"), ago(seen.tpot), { span: SPAN, unit: time, dots: true });
  $("now-rate").textContent = rates.length ? rate(rates.at(-1)[1]) : "–";
  for (const name of ["ttft", "tpot"]) {
    const mid = middle(seen[name].map((p) => p[1]));
    $(`now-${name}`).textContent = mid === null ? "–" : time(mid);
  }
}

function figures(s, e) {
  const prompts = smooth(seen.prompt).at(-1);
  const list = [
    ["Running", s.running, `of ${e.max_num_seqs}`],
    ["Waiting", s.waiting, ""],
    ["Prompt", prompts ? rate(Math.max(0, prompts[1])) : "–", ""],
    ["KV in use", `${((100 * s.slots_leased) / (s.slots_total || 1)).toFixed(1)} %`, ""],
    ["Cache hits", s.prompt_tokens ? `${((100 * s.cached_tokens) / s.prompt_tokens).toFixed(0)} %` : "–", ""],
    ["Generated", count(s.generated_tokens), "tokens"],
    ["Steps", count(s.steps), ""],
    ["Preempted", s.preemptions, ""],
  ];
  const box = $("figures");
  while (box.children.length < list.length) {
    const cell = document.createElement("div");
    cell.append(document.createElement("dt"), document.createElement("dd"));
    box.append(cell);
  }
  list.forEach(([name, value, unit], i) => {
    const [dt, dd] = box.children[i].children;
    dt.textContent = name;
    dd.textContent = String(value);
    if (unit) {
      const small = document.createElement("small");
      small.textContent = ` ${unit}`;
      dd.append(small);
    }
  });
}
