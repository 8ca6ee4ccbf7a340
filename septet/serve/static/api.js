// Talking with the server: the key, JSON, and server-sent events over fetch (EventSource can't send a key).

let key = sessionStorage.getItem("septet.key") || "";

export function setKey(value) {
  key = value.trim();
  if (key) sessionStorage.setItem("septet.key", key);
  else sessionStorage.removeItem("septet.key");
}

export const storedKey = () => key;

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}) };
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let words = `the server answered ${response.status}`;
  try {
    const body = await response.json();
    words = body.error?.message || words;
  } catch { /* not JSON: the status says enough */ }
  const wait = response.headers.get("retry-after");
  throw new ApiError(response.status, wait ? `${words} (in ${wait} s)` : words);
}

export const getJson = async (path) => (await request(path)).json();

// Yields the parsed data of each event until the stream ends or `signal` aborts.
export async function* events(path, body, signal) {
  const options = body ? { method: "POST", body: JSON.stringify(body), signal } : { signal };
  const response = await request(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += value;
    for (let end; (end = waiting.indexOf("\n\n")) >= 0; waiting = waiting.slice(end + 2)) {
      const data = waiting.slice(0, end).split("\n").filter((l) => l.startsWith("data:")).map((l) => l.slice(5)).join("\n").trim();
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}
