/** Fetches what the store lacks: the whole run, a zoom, a layer, the rows around the cursor. Stale answers are dropped. */
import { getBlock, getJson } from "./api";
import { LayerHistory } from "./layer";
import { planFetch, type Plan } from "./plan";
import { Series } from "./series";
import { chunkSteps, snapshotsOf } from "./snapshot";
import { decodeSteps, type Steps } from "./steps";
import { termRows } from "./terms";
import type { Range, RunStore } from "./store";
import { reachOut } from "./told";
import type { RunEvent } from "./types";

const SCALAR_PIECES = 4;
const LAYER_PIECES = 2;
const SNAPSHOT = "scalars=&tensors=expert_tokens,router_prob,dropped,expert_bias,balance_loss,router_entropy,phase_ms,rank_tokens,rank_traffic";
const MAX_EVENT_PAGES = 20;
const MAX_TURNS = 5;

export class History {
  private readonly aborts = new Map<string, AbortController>();

  constructor(private readonly store: RunStore) {}

  /** Steps after what is held, up to `to`, into the whole series. */
  async fill(to: number): Promise<void> {
    const signal = this.fresh("fill");
    const from = this.store.lastStep + 1;
    if (to < from) return;
    const plan = planFetch(this.store.whole.length ? from : 1, to, SCALAR_PIECES);
    if (!this.store.whole.length) this.store.whole = new Series(plan.level);
    for (const piece of plan.pieces) this.store.applySteps(await this.steps(piece.from, piece.to, "scalars=*&tensors=", signal), false);
  }

  /** The series of the chosen range at its own level of detail. */
  async zoom(): Promise<void> {
    const signal = this.fresh("zoom");
    if (!this.store.range) return;
    const { from, plan } = this.planRange(this.store.range, SCALAR_PIECES);
    if (plan.level >= this.store.whole.level) return;
    const series = new Series(plan.level, from - 1);
    for (const piece of plan.pieces) series.apply(await this.steps(piece.from, piece.to, "scalars=*&tensors=", signal));
    this.store.zoomed = series;
    this.store.emit("steps");
  }

  /** The chosen layer's counts, for the whole run or for the chosen range. */
  async layer(): Promise<void> {
    const { store } = this;
    const signal = this.fresh("layer");
    const { experts, moe_layers: layers } = store.run;
    const to = store.lastStep;
    if (!experts || !layers.length || !to) return;
    const { from, plan } = store.range ? this.planRange(store.range, LAYER_PIECES) : { from: 1, plan: planFetch(1, to, LAYER_PIECES) };
    const history = new LayerHistory(store.layer, experts, plan.level, from - 1);
    const query = `scalars=&tensors=expert_tokens&layer=${store.layer}`;
    for (const piece of plan.pieces) history.apply(await this.steps(piece.from, piece.to, query, signal));
    // Live rows go by while this is fetched: take what it missed before it hears them itself.
    for (let turn = 0; !store.range && turn < MAX_TURNS && store.lastStep > history.lastStep; turn++) {
      history.apply(await this.steps(history.lastStep + 1, store.lastStep, query, signal));
    }
    if (store.range) store.layerZoomed = history;
    else store.layerWhole = history;
    store.emit("layer", "steps");
  }

  /** How to fetch the chosen range with the told steps on either side of it; without them where every step is told, or where more steps would share a row. */
  private planRange(range: Range, maxPieces: number): { from: number; plan: Plan } {
    const { whole, every, lastStep } = this.store;
    const planOf = ({ from, to }: Range) => ({ from, plan: planFetch(from, Math.min(to, lastStep), maxPieces) });
    const [plain, reached] = [planOf(range), planOf(reachOut(whole, range))];
    return every === 1 || reached.plan.level > Math.max(plain.plan.level, every ?? 1) ? plain : reached;
  }

  /** The chosen layer's balancing terms over the whole run. */
  async terms(): Promise<void> {
    const { store } = this;
    const signal = this.fresh("terms");
    const { balance_terms: terms = [], moe_layers: layers } = store.run;
    const { layer, lastStep: to } = store;
    if (!terms.length || !layers.length || !to) return;
    const plan = planFetch(1, to, LAYER_PIECES);
    const series = new Series(plan.level);
    const take = async (from: number, to: number) => {
      const rows = termRows(await this.steps(from, to, `scalars=&tensors=balance_loss&layer=${layer}`, signal), layer, terms);
      if (rows) series.apply(rows);
    };
    for (const piece of plan.pieces) await take(piece.from, piece.to);
    for (let turn = 0; turn < MAX_TURNS && store.lastStep > series.lastStep; turn++) await take(series.lastStep + 1, store.lastStep);
    store.terms = series;
    store.emit("steps");
  }

  /** The rows around the cursor, unless they are here; where none of them was told up to it, the last one that was. */
  async snapshot(): Promise<void> {
    const { store } = this;
    const { experts, moe_layers: layers } = store.run;
    if (!store.step || store.snapshots.holds(store.step)) return;
    const signal = this.fresh("snapshot");
    const span = chunkSteps(layers.length, experts, store.expertRanks);
    const { step } = store;
    const from = Math.max(step - Math.ceil(span / 2), 1);
    const to = Math.max(Math.min(from + span, store.lastStep), step);
    const rows = snapshotsOf(await this.steps(from, to, SNAPSHOT, signal));
    const told = rows.some((row) => row.step <= step) ? step : await this.nearestTold(step, signal);
    if (told < from || told > to) rows[told < from ? "unshift" : "push"](...snapshotsOf(await this.steps(told, told, SNAPSHOT, signal)));
    store.snapshots.add(Math.min(told, from), Math.max(told, to), rows);
    store.emit("snapshot");
  }

  /** The step that was told last up to `step`, or else first. */
  private async nearestTold(step: number, signal: AbortSignal): Promise<number> {
    const { whole } = this.store;
    const row = whole.rowAt(step);
    const known = whole.step[Math.max(row, 0)];
    if (whole.level === 1) return known;
    // Of several steps in one row the series knows only the last.
    const [from, to] = row < 0 ? [1, known] : [known, step];
    const near = [...(await this.steps(from, to, "scalars=&tensors=", signal)).step];
    return near.findLast((one) => one <= step) ?? near[0] ?? known;
  }

  /** The sample that belongs to the cursor, unless it is here. */
  async sample(): Promise<void> {
    const { store } = this;
    const step = store.samples.missing(store.step);
    if (!step) return;
    const signal = this.fresh("sample");
    store.samples.take(await this.steps(step, step, "scalars=&tensors=part_ms,sent_bytes", signal), step);
    store.emit("snapshot");
  }

  async events(): Promise<void> {
    let cursor: string | null = "";
    for (let page = 0; page < MAX_EVENT_PAGES && cursor !== null; page++) {
      const query: string = cursor ? `?cursor=${encodeURIComponent(cursor)}` : "";
      const answer: { items: RunEvent[]; next_cursor: string | null } = await getJson(`/runs/${this.store.run.id}/events${query}`);
      this.store.applyEvents(answer.items);
      cursor = answer.next_cursor;
    }
  }

  private async steps(from: number, to: number, query: string, signal: AbortSignal): Promise<Steps> {
    return decodeSteps(await getBlock(`/runs/${this.store.run.id}/steps?from=${from}&to=${to}&points=2000&${query}`, signal));
  }

  private fresh(what: string): AbortSignal {
    this.aborts.get(what)?.abort();
    const abort = new AbortController();
    this.aborts.set(what, abort);
    return abort.signal;
  }
}
