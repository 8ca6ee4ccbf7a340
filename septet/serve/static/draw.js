// Pictures of the scope: curves, the batch, the pool, the tree. Plain SVG and one canvas; no state but their elements.

const NS = "http://www.w3.org/2000/svg";
export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function node(name, attributes, text) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// points: [seconds ago, value]; `dots`: single observations rather than a line.
export function curve(svg, points, { span, unit, dots = false }) {
  const width = svg.clientWidth || 200, height = svg.clientHeight || 72;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const top = Math.max(1e-9, ...points.map((p) => p[1])) * 1.15;
  const x = (ago) => width * (1 - ago / span), y = (v) => height - 4 - (height - 18) * (v / top);
  const parts = [node("line", { class: "grid", x1: 0, x2: width, y1: height - 4, y2: height - 4 })];
  if (points.length) {
    const path = points.map(([ago, v]) => `${x(ago).toFixed(1)},${y(v).toFixed(1)}`);
    if (dots) for (const [ago, v] of points) parts.push(node("circle", { class: "dot", cx: x(ago), cy: y(v), r: 2.2 }));
    else {
      const first = x(points[0][0]).toFixed(1), last = x(points.at(-1)[0]).toFixed(1);
      parts.push(node("polygon", { class: "area", points: `${first},${height - 4} ${path.join(" ")} ${last},${height - 4}` }));
      parts.push(node("polyline", { class: "line", points: path.join(" ") }));
    }
    const most = Math.max(...points.map((p) => p[1]));
    if (most > 0) parts.push(node("text", { x: 6, y: 13 }, `max ${unit(most)}`));
  }
  svg.replaceChildren(...parts);
}

// One bar per request: what came from the cache, what is computed of the prompt, the output; up to its limit.
export function batch(svg, rows, more) {
  const width = svg.clientWidth || 400, step = 15, bar = 10, left = 62, right = 76;
  const shown = rows.slice(0, 24), rest = more + rows.length - shown.length;
  const height = Math.max(1, shown.length + (rest ? 1 : 0)) * step + 2;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.style.height = `${height}px`;
  if (!shown.length) {
    svg.replaceChildren(node("text", { class: "none", x: 0, y: 12 }, "nothing runs"));
    return;
  }
  const longest = Math.max(64, ...shown.map((r) => Math.max(r.length, Math.min(r.limit, 2 * r.length))));
  const scale = (width - left - right) / longest;
  const parts = [];
  shown.forEach((row, i) => {
    const y = i * step + 2, limit = Math.min(row.limit, longest);
    const piece = (kind, from, to) => to > from && parts.push(node("rect", { class: kind, x: left + from * scale, y, width: (to - from) * scale, height: bar, rx: 2 }));
    parts.push(node("text", { x: 0, y: y + 9 }, row.state));
    piece("track", 0, limit);
    if (row.state === "waiting") piece("waiting", 0, row.prompt);
    else {
      piece("cached", 0, Math.min(row.cached, row.computed));
      piece("prefill", row.cached, Math.min(row.prompt, row.computed));
      piece("decode", row.prompt, row.computed);
    }
    parts.push(node("text", { x: width, y: y + 9, "text-anchor": "end" }, `${row.prompt} + ${Math.max(0, row.length - row.prompt)}`));
  });
  if (rest) parts.push(node("text", { x: 0, y: shown.length * step + 12 }, `and ${rest} more`));
  svg.replaceChildren(...parts);
}

// A cell is `cell_slots` slots, filled from below: shared, leased, then cached. The counts are estimates.
export function pool(canvas, map) {
  const n = map.free.length, columns = Math.min(n, 32), lines = Math.ceil(n / columns);
  const width = canvas.clientWidth || 400, cell = width / columns, height = Math.max(14, Math.min(cell, 18)), gap = 2;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.style.height = `${lines * height}px`;
  canvas.height = lines * height * ratio;
  const draw = canvas.getContext("2d");
  draw.scale(ratio, ratio);
  const colours = { free: css("--free"), cached: css("--cached"), leased: css("--decode"), shared: css("--shared") };
  for (let i = 0; i < n; i++) {
    const x = (i % columns) * cell, y = Math.floor(i / columns) * height, w = cell - gap, h = height - gap;
    const free = Math.min(1, map.free[i] / map.cell_slots), leased = Math.min(1 - free, map.leased[i] / map.cell_slots);
    const shared = Math.min(1 - free, map.shared[i] / map.cell_slots), held = Math.max(leased, shared);
    let at = y + h;
    const fill = (colour, share) => {
      if (share <= 0) return;
      draw.fillStyle = colour;
      draw.fillRect(x, at - h * share, w, h * share);
      at -= h * share;
    };
    fill(colours.shared, shared);
    fill(colours.leased, held - shared);
    const cached = 1 - free - held;
    fill(colours.cached, cached > (map.cell_slots > 8 ? 0.12 : 0) ? cached : 0);
    fill(colours.free, 1 - Math.max(0, (y + h - at) / h));
  }
}

// Nested bars, left to right along the tokens; a branch stands below its siblings and to the right of its parent.
export function tree(svg, branches) {
  const width = svg.clientWidth || 400, step = 22;
  if (!branches.length) {
    svg.setAttribute("viewBox", `0 0 ${width} 18`);
    svg.style.height = "18px";
    svg.replaceChildren(node("text", { class: "none", x: 0, y: 12 }, "no prefix is kept yet"));
    return;
  }
  const children = branches.map(() => []), roots = [], depth = [];
  branches.forEach((branch, i) => (branch.parent < 0 ? roots : children[branch.parent]).push(i));
  branches.forEach((branch, i) => { depth[i] = branch.parent < 0 ? 0 : depth[branch.parent] + weight(branches[branch.parent]); });
  const scale = width / Math.max(...branches.map((branch, i) => depth[i] + weight(branch)));
  const parts = [];
  let line = 0;
  const place = (i) => {
    const branch = branches[i], y = line * step, x = depth[i] * scale, w = Math.max(4, weight(branch) * scale - 2);
    const label = `${branch.tokens} tok${branch.hits ? ` · ${branch.hits} hit${branch.hits > 1 ? "s" : ""}` : ""}${branch.text ? ` · ${branch.text.replace(/\s+/g, " ")}` : ""}`;
    const box = node("rect", { class: branch.locks ? "used" : "cached", x, y, width: w, height: step - 3, opacity: 0.7 + 0.3 * Math.min(1, branch.hits / 8) });
    box.append(node("title", {}, `${label}; ${branch.locks} running, ${branch.children} branches`));
    parts.push(box);
    const fits = Math.floor((w - 10) / 6);
    if (fits > 3) parts.push(node("text", { class: "label", x: x + 6, y: y + 13.5 }, label.length > fits ? `${label.slice(0, fits - 1)}…` : label));
    if (!children[i].length) line++;
    children[i].forEach(place);
  };
  roots.forEach(place);
  svg.setAttribute("viewBox", `0 0 ${width} ${line * step}`);
  svg.style.height = `${line * step}px`;
  svg.replaceChildren(...parts);
}

// Long runs grow slower than short ones, so that both can be read.
const weight = (branch) => 24 + 12 * Math.sqrt(branch.tokens);
