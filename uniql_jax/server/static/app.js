// The page of `uniql serve`: a conversation over /v1/chat/completions, and the prune rate over /admin/rate.
"use strict";

const $ = (id) => document.getElementById(id);
let turns = [];
let model = "", chats = true, running = null, setting = false, timer = 0;
const narrow = matchMedia("(max-width: 46rem)"); // numbers are folded there, so that the message box is on the first screen

function bytes(count) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 999.5) return `${unit === "B" ? count : Number(count.toPrecision(3))} ${unit}`;
    count /= 1000;
  }
  return `${count.toPrecision(3)} TB`;
}

// What went wrong last: with the connection, which the next answer mends, or with what was asked, until that is done anew.
const problems = { connection: "", asked: "" };

function problem(of, text) {
  problems[of] = text || "";
  const shown = problems.connection || problems.asked;
  if ($("problem").textContent !== shown) $("problem").textContent = shown;
  $("problem").hidden = !shown;
}

async function call(path, body, signal) {
  const key = sessionStorage.getItem("uniql-key");
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const options = { headers, signal, cache: "no-store" };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  const found = await answer.json().catch(() => null);
  if (answer.status === 401) $("key-form").hidden = false;
  throw new Error(found?.error?.message || `the server answered ${answer.status}`);
}

// ---------------------------------------------------------------------------------------------------- state and rate

function show(status) {
  model = status.model;
  chats = status.chat;
  if (!chats) $("say").placeholder = "A text to go on with (Enter sends)";
  $("model").textContent = model;
  document.title = `${model} – uniql`;
  $("rate").max = Math.round(status.highest_rate * 100);
  if (!setting && document.activeElement !== $("rate")) {
    $("rate").value = Math.round(status.rate * 100);
    $("rate-value").value = `${Number((status.rate * 100).toFixed(1))} %`;
  }
  $("rate").disabled = status.highest_rate === 0;
  $("setting-row").hidden = !status.nested;
  $("setting").textContent = status.setting ? status.setting.says : "all bits";
  $("speed").textContent = `${status.tokens_per_second.toFixed(1)} tokens/s`;
  $("weights").textContent = bytes(status.memory.weights);
  $("cache").textContent = bytes(status.memory.cache);
  $("free").textContent = bytes(status.free_memory);
  const measured = status.setting ? 0 : status.perplexity[String(status.rate)];
  $("perplexity").textContent = measured ? measured.toFixed(2) : "not measured";
  $("texts").textContent = `${status.active} of ${status.rows}, ${status.waiting} waiting`;
}

async function refresh() {
  try {
    show(await (await call("/status")).json());
    problem("connection", "");
  } catch (error) {
    problem("connection", error.message);
  }
}

async function changeRate() {
  setting = true;
  try {
    await call("/admin/rate", { rate: Number($("rate").value) / 100 });
    problem("asked", "");
  } catch (error) {
    problem("asked", error.message);
  } finally {
    setting = false;
    refresh();
  }
}

$("rate").addEventListener("input", () => {
  setting = true;
  $("rate-value").value = `${$("rate").value} %`;
  clearTimeout(timer);
  timer = setTimeout(changeRate, 300);
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("uniql-key", $("key").value);
  $("key").value = "";
  $("key-form").hidden = true;
  refresh();
});

// ---------------------------------------------------------------------------------------------------- conversation

function bubble(role, text) {
  const item = document.createElement("li");
  item.className = role;
  const body = document.createElement("div");
  body.textContent = text;
  item.append(body);
  $("log").append(item);
  item.scrollIntoView({ block: "end" });
  return body;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function ask(text) {
  const messages = turns; // a new conversation leaves this one behind
  messages.push({ role: "user", content: text });
  bubble("user", text);
  const body = bubble("assistant", "");
  const system = $("system").value.trim();
  const request = {
    model, stream: true, stream_options: { include_usage: true },
    temperature: Number($("temperature").value), max_tokens: Number($("tokens").value),
  };
  if (chats) request.messages = system ? [{ role: "system", content: system }, ...messages] : messages;
  else request.prompt = text; // a model without a chat template goes on with what it is given
  const path = chats ? "/v1/chat/completions" : "/v1/completions";
  running = new AbortController();
  $("stop").hidden = false;
  $("send").disabled = true;
  problem("asked", "");
  let usage = null, rates = "", first = 0; // speed is counted from the first piece: before it, a prompt is read
  try {
    for await (const event of events(await call(path, request, running.signal))) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0], piece = (chats ? choice?.delta.content : choice?.text) || "";
      body.textContent += piece;
      if (piece) first ||= performance.now();
      usage = event.usage || usage;
      rates = event.system_fingerprint || rates;
      if (piece) body.parentElement.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    if (error.name !== "AbortError") problem("asked", error.message);
  }
  if (body.textContent || !problems.asked) messages.push({ role: "assistant", content: body.textContent });
  else { // nothing came: as if it had not been asked, with the text back in the box
    messages.pop();
    body.parentElement.previousElementSibling?.remove();
    body.parentElement.remove();
    $("say").value ||= text;
  }
  const note = document.createElement("footer");
  const seconds = (performance.now() - first) / 1000, count = usage?.completion_tokens || 0;
  const speed = count ? `${count} tokens, ${(Math.max(count - 1, 0) / seconds).toFixed(1)}/s, ` : "";
  note.textContent = `${speed}prune rate ${rates.replace("uniql-rate-", "").replaceAll(",", " → ") || "–"}`;
  body.parentElement.append(note);
  running = null;
  $("stop").hidden = true;
  $("send").disabled = false;
  refresh();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("say").value.trim();
  if (!text || running) return;
  $("say").value = "";
  ask(text);
});
$("say").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("reset").addEventListener("click", () => {
  running?.abort();
  turns = [];
  $("log").replaceChildren();
  $("say").focus();
});

const fold = () => $("numbers").open = !narrow.matches;
narrow.addEventListener("change", fold);
fold();
refresh();
setInterval(() => document.hidden || refresh(), 1500);
$("say").focus();
