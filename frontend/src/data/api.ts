/** REST calls as the browser makes them: session cookie, CSRF header, problem+json turned into an error. */
import type { Problem } from "./types";

export class ApiError extends Error {
  constructor(readonly problem: Problem) {
    super([...new Set([problem.title, problem.detail])].filter(Boolean).join(": "));
  }
}

const csrfToken = (): string => document.cookie.match(/(?:^|; )csrftoken=([^;]+)/)?.[1] ?? "";

async function send(method: string, path: string, body?: unknown, signal?: AbortSignal, headers: Record<string, string> = {}): Promise<Response> {
  const all: Record<string, string> = { Accept: "application/json, application/octet-stream;q=0.9, */*;q=0.1", ...headers };
  if (body !== undefined) all["Content-Type"] = "application/json";
  if (method !== "GET") all["X-CSRFToken"] = csrfToken();
  let response: Response;
  try {
    response = await fetch(`/api/v1${path}`, { method, headers: all, body: body === undefined ? null : JSON.stringify(body), signal: signal ?? null, credentials: "same-origin" });
  } catch (error) {
    if ((error as Error).name === "AbortError") throw error;
    throw new ApiError({ title: "The server cannot be reached", status: 0, detail: "nothing was changed" });
  }
  if (!response.ok) throw new ApiError(await problemOf(response));
  return response;
}

async function problemOf(response: Response): Promise<Problem> {
  const fallback = { title: response.statusText || `Error ${response.status}`, status: response.status };
  try {
    return { ...fallback, ...((await response.json()) as Partial<Problem>) };
  } catch {
    return fallback;
  }
}

export async function getJson<T>(path: string, signal?: AbortSignal): Promise<T> {
  return (await send("GET", path, undefined, signal)).json() as Promise<T>;
}

export async function getBlock(path: string, signal?: AbortSignal): Promise<ArrayBuffer> {
  return (await send("GET", path, undefined, signal, { Accept: "application/octet-stream" })).arrayBuffer();
}

export async function getText(path: string, signal?: AbortSignal): Promise<{ text: string; nextOffset: number }> {
  const response = await send("GET", path, undefined, signal, { Accept: "text/plain" });
  return { text: await response.text(), nextOffset: Number(response.headers.get("X-Next-Offset") ?? 0) };
}

/** Sends a change. Resolves to the answer's JSON, or null where there is none. */
export async function change<T>(method: "POST" | "PATCH" | "DELETE", path: string, body?: unknown, headers: Record<string, string> = {}, signal?: AbortSignal): Promise<T> {
  const response = await send(method, path, body, signal, headers);
  const text = await response.text();
  return (text ? JSON.parse(text) : null) as T;
}
