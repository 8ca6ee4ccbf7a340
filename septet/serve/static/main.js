// Wires the page: views, models, keys of the keyboard. State lives in chat.js and scope.js.

import { ApiError, getJson, setKey, storedKey } from "./api.js";
import { ask, busy, forget, restoreSettings, stop } from "./chat.js";
import { unwatch, watch } from "./scope.js";

const $ = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 860px)");

// -- views -----------------------------------------------------------------------------------------------------------
function view(name) {
  document.body.dataset.view = name;
  for (const other of ["chat", "scope"]) {
    $(`tab-${other}`).setAttribute("aria-selected", String(other === name));
    $(`tab-${other}`).tabIndex = other === name ? 0 : -1;
  }
  followScope();
}

function followScope() {
  const seen = !document.hidden && (!narrow.matches || document.body.dataset.view === "scope");
  if (seen) watch($("model").value);
  else unwatch();
}

function settings(open) {
  $("settings").hidden = !open;
  $("open-settings").setAttribute("aria-expanded", String(open));
}

// -- models ----------------------------------------------------------------------------------------------------------
async function listModels() {
  try {
    const { data } = await getJson("/v1/models");
    const chosen = $("model").value || localStorage.getItem("septet.model");
    $("model").replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === chosen)));
    if (!data.length) $("model").replaceChildren(new Option("no model yet", ""));
    followScope();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) askForKey();
    else setTimeout(listModels, 3000);
  }
}

function askForKey() {
  settings(true);
  $("key").focus();
  $("scope-state").textContent = "an API key is needed (Settings)";
}

// -- asking ----------------------------------------------------------------------------------------------------------
async function send(text) {
  if (busy() || !text.trim()) return;
  $("prompt").value = "";
  $("send").hidden = true;
  $("stop").hidden = $("fresh").hidden = false;
  await ask(text, $("model").value);
  $("send").hidden = false;
  $("stop").hidden = true;
  followScope();
  if (!narrow.matches) $("prompt").focus();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("prompt").value);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send($("prompt").value);
  }
});
$("stop").addEventListener("click", stop);
$("fresh").addEventListener("click", () => {
  forget();
  $("fresh").hidden = true;
  $("prompt").focus();
});
for (const example of $("examples").children) example.addEventListener("click", () => send(example.textContent));

// -- everything else -------------------------------------------------------------------------------------------------
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select");
  if (event.key === "Escape") {
    if (busy()) stop();
    else settings(false);
  } else if (event.key === "/" && !typing) {
    event.preventDefault();
    view("chat");
    $("prompt").focus();
  }
});
for (const name of ["chat", "scope"]) {
  $(`tab-${name}`).addEventListener("click", () => view(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      const other = name === "chat" ? "scope" : "chat";
      view(other);
      $(`tab-${other}`).focus();
    }
  });
}
$("open-settings").addEventListener("click", () => {
  settings(narrow.matches && document.body.dataset.view !== "chat" ? true : $("settings").hidden);
  view("chat");
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("key").value = storedKey();
$("key").addEventListener("change", () => {
  setKey($("key").value);
  unwatch();
  listModels();
});
$("model").addEventListener("change", () => {
  localStorage.setItem("septet.model", $("model").value);
  followScope();
});
document.addEventListener("septet:key", askForKey);
document.addEventListener("visibilitychange", followScope);
narrow.addEventListener("change", followScope);

restoreSettings();
view("chat");
listModels();
