/** The live page of one run. */
import "uplot/dist/uPlot.min.css";
import { History } from "../data/history";
import { LiveSocket, type Status } from "../data/socket";
import { decodeSteps } from "../data/steps";
import { RunStore, type Fetched } from "../data/store";
import type { LiveMessage, Run } from "../data/types";
import { initActions } from "../view/actions";
import { initBalancing } from "../view/balancing";
import { initBars } from "../view/bars";
import { byId, pageData } from "../view/dom";
import { initBanner } from "../view/banner";
import { initEvents } from "../view/events";
import { initExpert } from "../view/expert";
import { debounced } from "../view/frame";
import { initHeader } from "../view/header";
import { initHealth } from "../view/health";
import { initLog } from "../view/log";
import { initLoss } from "../view/loss";
import { initMetrics } from "../view/metrics";
import { initRanks } from "../view/ranks";
import { Routing } from "../view/routing";
import { initRunKeys } from "../view/run-keys";
import { initTabs } from "../view/tabs";
import { initTimeline } from "../view/timeline";
import { tellError } from "../view/toast";

interface PageData {
  run: Run;
  log_size: number;
  /** Of a sampled step; `every` steps apart, 0 for never, null where nobody knows. */
  parts: { names: string[]; every: number | null };
  expert_ranks: number;
  /** Steps between those that are told; null where nobody knows. */
  every: number | null;
  /** What the run waits for while it is queued. */
  waits_for: string;
}

const { run, log_size: logSize, parts, expert_ranks: expertRanks, every, waits_for: waitsFor } = pageData<PageData>("run-data");
const store = new RunStore(run, parts.every, expertRanks, every);
const history = new History(store);
let showStatus: (status: Status) => void = () => undefined;
/** The newest event that the socket has told: after a broken connection it tells those that came since. */
let lastEvent: number | null = null;

const socket = new LiveSocket({
  path: () => `/ws/runs/${run.id}/?after=${store.lastStep}` + (lastEvent === null ? "" : `&event=${lastEvent}`),
  onBinary: (bytes) => store.applySteps(decodeSteps(bytes)),
  onText: (message) => hear(message as LiveMessage),
  onStatus: (status) => showStatus(status),
});

function hear(message: LiveMessage): void {
  if (message.type === "hello") lastEvent = message.last_event;
  if (message.type === "event") lastEvent = Math.max(lastEvent ?? 0, message.event.id);
  if (message.type === "resync") lastEvent = Math.max(lastEvent ?? 0, message.last_event);
  if (message.type === "resync") void resync(message.from_step).catch(tellError);
  else store.applyMessage(message);
}

/** What the page has from `fromStep` on is missing or void: it takes the rest from the store, or everything where it must forget, and goes on. */
async function resync(fromStep: number): Promise<void> {
  if (fromStep <= store.lastStep) return load();
  socket.stop();
  await attempt("whole", history.fill(store.run.last_step));
  listen();
}

function listen(): void {
  socket.connect();
  void attempt("layer", history.layer());
  void attempt("terms", history.terms());
  void attempt("events", history.events());
  atCursor();
}

/** Fetches everything before the live rows, then listens. */
async function load(): Promise<void> {
  socket.stop();
  store.clear();
  if (run.last_step) await attempt("whole", history.fill(store.run.last_step));
  byId("panel-live").setAttribute("aria-busy", "false");
  listen();
}

function atCursor(): void {
  void attempt("snapshot", history.snapshot());
  void attempt("sample", history.sample());
}

/** What cannot be fetched is said once, and where it would stand: each view fails alone. */
async function attempt(what: Fetched, work: Promise<void>): Promise<void> {
  try {
    await work;
    store.fail(what);
  } catch (error) {
    tellError(error);
    if ((error as Error).name !== "AbortError") store.fail(what, `Could not be loaded. ${(error as Error).message}`);
  }
}

function initRouterWatch(): void {
  const draw = () => byId("panel-live").classList.toggle("no-router", store.lastStep > 0 && store.run.moe_layers.length === 0);
  store.on("run", draw);
  draw();
}

showStatus = initBanner(socket);
initHeader(store, waitsFor);
initHealth(store);
initActions(store);
initTabs();
initTimeline(store);
initLoss(store);
new Routing(store);
initBars(store);
initBalancing(store);
initExpert(store);
initRanks(store, parts.names);
initMetrics(store);
initEvents(store);
initLog(store, logSize);
initRouterWatch();
initRunKeys(store);

store.on(["cursor", "steps"], debounced(60, atCursor));
store.on("range", () => {
  void attempt("zoom", history.zoom());
  void attempt("layer", history.layer());
});
store.on("layer", () => {
  if (!store.layerHistory) void attempt("layer", history.layer());
  if (!store.terms) void attempt("terms", history.terms());
});
store.on("run", () => {
  if (!store.layerWhole && store.lastStep) void attempt("layer", history.layer());
  if (!store.terms && store.lastStep) void attempt("terms", history.terms());
});
store.on("reload", () => void load());
void load();
