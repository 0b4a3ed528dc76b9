/** The routing heatmap: layers × experts at a step, or one layer's experts × steps. Pointer and keyboard read and choose cells. */
import { binRatios } from "../data/layer";
import { fairRatios } from "../data/fair";
import { untold } from "../data/told";
import type { Snapshot } from "../data/snapshot";
import type { RunStore } from "../data/store";
import { initBehind } from "./behind";
import { onThemeChange } from "./colour";
import { byId, readStored, setText, store as keep } from "./dom";
import { perFrame, watchSize } from "./frame";
import type { Key } from "./compose";
import { initSave, type Savable } from "./save";
import { Heatmap, drawLegend, type Cell, type Picture } from "./heatmap";
import { initCells } from "./cells";
import { countsRow, layerRows, otherStep, readCell, whyNoCounts, type Reading } from "./reading";

export type View = "layers" | "steps";

export class Routing {
  view: View;
  readonly heatmap: Heatmap;
  /** What stands in the picture's place until there is one. */
  private readonly hint: string;
  /** The first and the last step under each column of the experts × steps view. */
  private firsts: Float64Array = new Float64Array(0);
  private steps: Float64Array = new Float64Array(0);
  /** What the layers × experts view is drawn of. */
  private row: Snapshot | undefined;
  private readonly out = byId("routing-readout");
  private readonly howTo = this.out.dataset.hint ?? "";
  private readonly redraw: () => void;

  constructor(private readonly store: RunStore) {
    this.view = (readStored("routing-view") as View) ?? "layers";
    const canvas = byId<HTMLCanvasElement>("routing-canvas");
    this.heatmap = new Heatmap(canvas);
    this.hint = canvas.parentElement!.dataset.empty ?? "";
    const size = watchSize(canvas.parentElement!, () => this.redraw());
    this.redraw = perFrame(() => size.visible() && this.draw());
    store.on(["steps", "cursor", "snapshot", "layer", "range", "expert", "run", "failure"], this.redraw);
    onThemeChange(() => this.legend());
    initCells(canvas, this.heatmap, { hover: (cell) => this.hover(cell), choose: (cell) => this.choose(cell) });
    initBehind(byId("routing"), () => layerRows(store));
    initSave(byId("routing"), store, () => this.savable());
    this.buttons();
    this.legend();
  }

  private buttons(): void {
    for (const view of ["layers", "steps"] as const) {
      byId(`view-${view}`).addEventListener("click", () => {
        this.view = view;
        keep("routing-view", view);
        this.redraw();
      });
    }
  }

  private legend(): void {
    drawLegend(byId<HTMLCanvasElement>("routing-scale"));
    this.redraw();
  }

  private draw(): void {
    const picture = this.picture();
    byId("routing").classList.toggle("is-empty", !picture);
    for (const view of ["layers", "steps"]) byId(`view-${view}`).setAttribute("aria-pressed", String(view === this.view));
    this.out.dataset.hint = (this.view === "layers" ? otherStep(this.store, countsRow(this.store)) : "") + (picture ? this.howTo : "");
    if (!picture) return;
    this.heatmap.draw(picture);
    this.describe();
  }

  private picture(): Picture | null {
    return this.view === "layers" ? this.layersPicture() : this.stepsPicture();
  }

  private layersPicture(): Picture | null {
    const { store } = this;
    const row = countsRow(store);
    const why = whyNoCounts(store);
    if (why) this.heatmap.canvas.parentElement!.dataset.empty = why;
    if (why) return null;
    const tokens = row?.tensors.expert_tokens;
    // Until the rows of another step are here, those of the last one stay.
    if (!row || !tokens) return this.heatmap.picture?.rowTitle === "layer" ? this.heatmap.picture : null;
    this.row = row;
    return {
      rows: row.layers,
      columns: row.experts,
      ratios: fairRatios(tokens, row.layers, row.experts),
      rowLabel: (r) => String(store.run.moe_layers[r] ?? r),
      columnLabel: String,
      rowTitle: "layer",
      columnTitle: "expert",
      columnBorders: this.borders(row.experts),
      rowBorders: [],
      markedRow: store.layer,
      markedColumn: store.expert,
      markedCell: true,
    };
  }

  private stepsPicture(): Picture | null {
    const { store } = this;
    const history = store.layerHistory;
    if (!history?.length) {
      this.heatmap.canvas.parentElement!.dataset.empty = store.failures.get("layer") ?? this.hint;
      return null;
    }
    const { from, to } = store.shown;
    const width = Math.max(this.heatmap.canvas.parentElement!.clientWidth - 48, 50);
    const { ratios, columns, firsts, steps } = binRatios(history, from, to, width);
    [this.firsts, this.steps] = [firsts, steps];
    if (!columns) {
      this.heatmap.canvas.parentElement!.dataset.empty = untold(store.whole, store.shown, store.every) || "Nothing was told of these steps.";
      return null;
    }
    const marked = store.follow ? -1 : steps.findIndex((step) => step >= store.step);
    return {
      rows: history.experts,
      columns,
      ratios,
      rowLabel: String,
      columnLabel: (c) => Math.round(steps[c]).toLocaleString("en-US"),
      rowTitle: "expert",
      columnTitle: "step",
      columnBorders: [],
      rowBorders: this.borders(history.experts),
      markedRow: store.expert,
      markedColumn: marked >= 0 ? marked : null,
      markedCell: false,
    };
  }

  /** A row for each cell of the picture. */
  private savable(): Savable | null {
    const { picture, canvas } = this.heatmap;
    if (!picture || byId("routing").classList.contains("is-empty")) return null;
    const { row, firsts, steps } = this;
    const byLayer = picture.rowTitle === "layer";
    const several = !byLayer && firsts.some((first, i) => first < steps[i]);
    const head = [...(several ? ["first_step", "last_step"] : ["step"]), "layer", "expert", "times_fair_share", ...(byLayer ? ["tokens"] : [])];
    const layer = this.store.run.moe_layers[this.store.layer] ?? this.store.layer;
    const rows = Array.from(picture.ratios, (ratio, i) => {
      const [r, c] = [Math.floor(i / picture.columns), i % picture.columns];
      if (byLayer) return [row!.step, picture.rowLabel(r), c, ratio, row!.tensors.expert_tokens![i]];
      return [...(several ? [firsts[c]] : []), steps[c], layer, r, ratio];
    });
    const keys: Key[] = [
      { label: "¼× to 4× of the fair share", colour: "--ink", shape: "scale" },
      { label: "no token", colour: "--ink", shape: "cross" },
    ];
    const title = byLayer ? "Routing, layers × experts" : `Routing of layer ${layer}, experts × steps`;
    const { from, to } = this.store.shown;
    return { title, steps: byLayer ? [row!.step, row!.step] : [from, to], picture: { canvas, keys }, table: { head, rows } };
  }

  /** Experts before which another rank's share begins. */
  private borders(experts: number): number[] {
    const ranks = this.store.expertRanks;
    return Array.from({ length: ranks - 1 }, (_, i) => ((i + 1) * experts) / ranks);
  }

  private reading(cell: Cell): Reading {
    const { store } = this;
    if (this.view === "layers") return { layer: cell.row, expert: cell.column, step: this.row?.step ?? store.step };
    return { layer: store.layer, expert: cell.row, step: this.steps[cell.column] ?? store.step };
  }

  private hover(cell: Cell | null): void {
    this.redraw();
    setText(this.out, cell ? readCell(this.store, this.reading(cell), this.heatmap.picture?.ratios[cell.row * this.heatmap.picture.columns + cell.column]) : "");
  }

  private choose(cell: Cell): void {
    const { layer, expert, step } = this.reading(cell);
    const { store } = this;
    if (layer !== store.layer) store.setLayer(layer);
    if (this.view === "steps") store.setStep(step);
    store.setExpert(expert);
  }

  private describe(): void {
    const { picture } = this.heatmap;
    if (!picture) return;
    let over = 0;
    let dead = 0;
    for (const ratio of picture.ratios) {
      if (ratio > 2) over++;
      if (ratio === 0) dead++;
    }
    const what = this.view === "layers" ? `layers by experts at step ${this.row?.step}` : `experts by steps of layer ${this.store.run.moe_layers[this.store.layer]}`;
    this.heatmap.canvas.setAttribute("aria-label", `Routing heatmap, ${what}: ${picture.rows} rows, ${picture.columns} columns, ${over} cells above twice the fair share, ${dead} without tokens. Arrow keys read cells, Enter chooses the expert.`);
  }
}
