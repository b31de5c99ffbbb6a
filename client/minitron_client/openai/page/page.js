// Streams one completion from this door and shows its timings. Times are the browser's own.
"use strict";

const at = (id) => document.getElementById(id);
let running = null; // AbortController of the stream under way

const headers = () => {
  const key = at("key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
};

const milliseconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

function showError(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the door answered ${response.status}`;
  }
}

async function showModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    at("key_row").hidden = false;
    return;
  }
  const models = (await response.json()).data.map((model) => model.id);
  at("model").replaceChildren(...models.map((id) => new Option(id)));
}

async function showState() {
  try {
    const state = await (await fetch("health")).json();
    at("state").textContent = state.status === "ready" ? "ready" : `${state.status} ${state.reason || ""}`;
    await showModels();
  } catch {
    at("state").textContent = "the door does not answer";
  }
}

function question() {
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  return {
    model: at("model").value || undefined,
    prompt: at("prompt").value,
    max_tokens: number("max_tokens"),
    temperature: number("temperature"),
    top_p: number("top_p"),
    seed: number("seed"),
    stop: at("stop").value.replaceAll("\\n", "\n") || undefined,
    stream: true,
    stream_options: { include_usage: true },
  };
}

// The events of a text/event-stream body, parsed.
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// What has been seen of one stream, on the page as it grows.
class Watch {
  constructor() {
    this.started = performance.now();
    this.first = this.last = this.tokens = null;
    for (const id of ["ttft", "speed", "tokens", "total", "reason"]) at(id).textContent = "–";
    at("text").textContent = "";
    at("lead").textContent = at("prompt").value;
  }

  see(event) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) this.tokens = event.usage.completion_tokens;
    for (const choice of event.choices) this.seeChoice(choice);
  }

  seeChoice(choice) {
    if (choice.text) {
      this.last = performance.now();
      this.first ??= this.last;
      const output = at("output");
      const follows = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
      at("text").append(choice.text);
      if (follows) output.scrollTop = output.scrollHeight;
      at("ttft").textContent = milliseconds(this.first - this.started);
    }
    if (choice.finish_reason) at("reason").textContent = choice.finish_reason;
  }

  end(reason) {
    at("total").textContent = milliseconds(performance.now() - this.started);
    if (reason) at("reason").textContent = reason;
    if (this.tokens === null) return;
    at("tokens").textContent = String(this.tokens);
    const seconds = (this.last - this.first) / 1000;
    if (this.tokens > 1 && seconds > 0) at("speed").textContent = `${((this.tokens - 1) / seconds).toFixed(1)} tok/s`;
  }
}

function setRunning(controller) {
  running = controller;
  at("go").disabled = Boolean(controller);
  at("halt").disabled = !controller;
  at("cursor").hidden = !controller;
  at("output").setAttribute("aria-busy", String(Boolean(controller)));
}

async function generate() {
  if (running) return;
  showError("");
  const controller = new AbortController();
  setRunning(controller);
  const watch = new Watch();
  let reason = "";
  try {
    const response = await fetch("v1/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(question()),
      signal: controller.signal,
    });
    if (!response.ok) {
      if (response.status === 401) at("key_row").hidden = false;
      throw new Error(await errorOf(response));
    }
    for await (const event of eventsOf(response.body)) watch.see(event);
  } catch (error) {
    reason = error.name === "AbortError" ? "you" : "an error";
    if (error.name !== "AbortError") showError(error.message);
  } finally {
    watch.end(reason);
    setRunning(null);
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
at("halt").addEventListener("click", () => running?.abort());
at("key").addEventListener("change", showState);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  }
});
showState();
