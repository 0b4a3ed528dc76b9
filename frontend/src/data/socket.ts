/** A WebSocket that comes back: jittered back-off, ping, and a word to the page about how it stands. */

export type Status = { kind: "open" } | { kind: "connecting" } | { kind: "closed"; retryAt: number };

export interface SocketOptions {
  /** The path to connect to, asked anew for each connection: it carries the cursor. */
  path: () => string;
  onText: (message: { type: string }) => void;
  onBinary?: (bytes: ArrayBuffer) => void;
  onStatus: (status: Status) => void;
}

const PING_MS = 20_000;
const PONG_MS = 10_000;
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 15_000;

/** Delay before retry number `attempt` (from 0), with up to a half of it taken off at random. */
export const backoff = (attempt: number, random = Math.random()): number => Math.min(FIRST_RETRY_MS * 2 ** attempt, LAST_RETRY_MS) * (1 - random / 2);

export class LiveSocket {
  private socket: WebSocket | null = null;
  private attempts = 0;
  private timer = 0;
  private pinger = 0;
  private heardAt = 0;

  constructor(private readonly options: SocketOptions) {
    addEventListener("online", () => this.retryNow());
    addEventListener("pagehide", () => this.stop());
    addEventListener("pageshow", (event) => event.persisted && this.connect());
  }

  connect(): void {
    clearTimeout(this.timer);
    this.options.onStatus({ kind: "connecting" });
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(`${scheme}//${location.host}${this.options.path()}`);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => this.opened();
    socket.onmessage = (message) => this.heard(message);
    socket.onclose = () => this.socket === socket && this.lost();
  }

  retryNow(): void {
    if (this.socket && this.socket.readyState <= WebSocket.OPEN) return;
    this.attempts = 0;
    this.connect();
  }

  stop(): void {
    clearTimeout(this.timer);
    clearInterval(this.pinger);
    const socket = this.socket;
    this.socket = null;
    socket?.close();
  }

  private opened(): void {
    this.heardAt = Date.now();
    clearInterval(this.pinger);
    this.pinger = window.setInterval(() => this.ping(), PING_MS);
    this.options.onStatus({ kind: "open" });
  }

  private heard(message: MessageEvent): void {
    this.heardAt = Date.now();
    this.attempts = 0;
    if (typeof message.data === "string") this.options.onText(JSON.parse(message.data));
    else this.options.onBinary?.(message.data as ArrayBuffer);
  }

  private ping(): void {
    if (Date.now() - this.heardAt > PING_MS + PONG_MS) this.socket?.close();
    else if (this.socket?.readyState === WebSocket.OPEN) this.socket.send('{"type":"ping"}');
  }

  private lost(): void {
    clearInterval(this.pinger);
    const delay = backoff(this.attempts++);
    this.options.onStatus({ kind: "closed", retryAt: Date.now() + delay });
    this.timer = window.setTimeout(() => this.connect(), delay);
  }
}
