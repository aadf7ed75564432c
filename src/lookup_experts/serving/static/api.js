// The server's API: what it does now, and a stream of tokens.

/** An answer that is not what was asked for; its message is a sentence for the reader. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function check(response) {
  if (response.ok) return response;
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not the server's own words, as from a proxy: the status says what is known.
  }
  throw new ApiError(response.status, message);
}

/** What `/v1/stats` tells. */
export async function fetchStats(key) {
  return (await check(await fetch("v1/stats", { headers: headers(key) }))).json();
}

/**
 * The chunks of a streamed answer, as they come.
 * @param {string} route `completions` or `chat/completions`
 * @param {object} body what is asked; with `lookup_details`, what the experts did comes too
 * @param {AbortSignal} signal ends it
 */
export async function* streamChunks(route, body, key, signal) {
  const response = await check(
    await fetch(`v1/${route}`, {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers(key) },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    }),
  );
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(200, chunk.error.message);
    yield chunk;
  }
  throw new ApiError(200, "The connection ended before the answer did.");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (pending + value).split("\n\n");
    pending = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ")) yield part.slice("data: ".length);
    }
  }
}
