/** The live page of one run. */
import "uplot/dist/uPlot.min.css";
import { History } from "../data/history";
import { LiveSocket, type Status } from "../data/socket";
import { decodeSteps } from "../data/steps";
import { RunStore } from "../data/store";
import type { LiveMessage, Run } from "../data/types";
import { initActions } from "../view/actions";
import { initBalancing } from "../view/balancing";
import { initBars } from "../view/bars";
import { all, byId, pageData } from "../view/dom";
import { initBanner } from "../view/banner";
import { initEvents } from "../view/events";
import { initExpert } from "../view/expert";
import { debounced } from "../view/frame";
import { initHeader } from "../view/header";
import { initLog } from "../view/log";
import { initLoss } from "../view/loss";
import { initMetrics } from "../view/metrics";
import { initRanks } from "../view/ranks";
import { Routing } from "../view/routing";
import { initTabs } from "../view/tabs";
import { initTimeline } from "../view/timeline";
import { tellError } from "../view/toast";

const { run, log_size: logSize, parts } = pageData<{ run: Run; log_size: number; parts: { names: string[]; every: number } }>("run-data");
const store = new RunStore(run, parts.every);
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
  if (message.type === "event") lastEvent = message.event.id;
  if (message.type === "resync") void resync(message.from_step).catch(tellError);
  else store.applyMessage(message);
}

/** What the page has from `fromStep` on is missing or void: it takes the rest from the store, or everything where it must forget, and goes on. */
async function resync(fromStep: number): Promise<void> {
  if (fromStep <= store.lastStep) return load();
  socket.stop();
  await history.fill(store.run.last_step);
  await Promise.all([history.layer(), history.terms(), history.events()]);
  socket.connect();
}

/** Fetches everything before the live rows, then listens. */
async function load(): Promise<void> {
  socket.stop();
  store.clear();
  if (run.last_step) await history.fill(store.run.last_step).catch(tellError);
  byId("panel-live").setAttribute("aria-busy", "false");
  socket.connect();
  for (const work of [history.layer(), history.terms(), history.snapshot(), history.sample(), history.events()]) quietly(work);
}

function initRouterWatch(): void {
  const draw = () => byId("panel-live").classList.toggle("no-router", store.lastStep > 0 && store.run.moe_layers.length === 0);
  store.on("run", draw);
  draw();
}

showStatus = initBanner(socket);
initHeader(store);
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

/** What cannot be fetched is said once, and where it would stand. */
const quietly = (work: Promise<void>) =>
  void work.catch((error: unknown) => {
    tellError(error);
    if ((error as Error).name !== "AbortError") for (const box of all("#routing .canvas-box, #bars .canvas-box")) box.dataset.empty = `Could not be loaded. ${(error as Error).message}`;
  });
store.on(["cursor", "steps"], debounced(60, () => quietly(Promise.all([history.snapshot(), history.sample()]).then(() => undefined))));
store.on("range", () => quietly(Promise.all([history.zoom(), history.layer()]).then(() => undefined)));
store.on("layer", () => {
  if (!store.layerHistory) quietly(history.layer());
  if (!store.terms) quietly(history.terms());
});
store.on("run", () => {
  if (!store.layerWhole && store.lastStep) quietly(history.layer());
  if (!store.terms && store.lastStep) quietly(history.terms());
});
store.on("reload", () => quietly(load()));
void load();
