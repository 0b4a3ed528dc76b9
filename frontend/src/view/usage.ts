/** Two heatmaps in one scale: which experts the text used, and which the training used before the checkpoint. */
import { deadCount, fairRatios } from "../data/fair";
import { metric, percent } from "../data/format";
import { TRAINING_STEPS, type Written } from "../data/generation";
import { initBehind } from "./behind";
import { initCells } from "./cells";
import { onThemeChange } from "./colour";
import { byId, setText } from "./dom";
import { perFrame, watchSize } from "./frame";
import { drawLegend, Heatmap, type Cell } from "./heatmap";

interface Side {
  name: string;
  heatmap: Heatmap;
  ratios: Float32Array | null;
}

export class Usage {
  private readonly sides: Record<"here" | "training", Side>;
  private written: Written | null = null;
  private layer = 0;
  private readonly redraw = perFrame(() => this.draw());

  /** `choose` is called with the row of the layer that the reader chooses. */
  constructor(private readonly choose: (layer: number) => void) {
    const side = (name: string, id: string): Side => ({ name, heatmap: new Heatmap(byId<HTMLCanvasElement>(id)), ratios: null });
    this.sides = { here: side("this text", "usage-here"), training: side("training", "usage-training") };
    for (const { heatmap } of Object.values(this.sides)) {
      initCells(heatmap.canvas, heatmap, { hover: (cell) => this.hover(heatmap, cell), choose: (cell) => this.choose(cell.row) });
      watchSize(heatmap.canvas.parentElement!, this.redraw);
    }
    initBehind(byId("usage"), () => this.rows());
    onThemeChange(() => this.legend());
    this.legend();
  }

  /** `load` is the training's [layer, expert] counts up to the checkpoint, where they are known. */
  show(written: Written, load: Float64Array | null): void {
    this.written = written;
    const [layers, experts] = [written.moe_layers.length, written.n_experts];
    byId("usage").hidden = !layers;
    this.sides.here.ratios = fairRatios(Float64Array.from(written.usage.flat()), layers, experts);
    this.sides.training.ratios = load && fairRatios(load, layers, experts);
    byId("usage-training-box").hidden = !load;
    const from = Math.max(1, written.step - TRAINING_STEPS + 1);
    setText(byId("usage-training-title"), `Training, steps ${from} to ${written.step}`);
    this.redraw();
  }

  mark(layer: number): void {
    this.layer = layer;
    this.redraw();
  }

  private legend(): void {
    drawLegend(byId<HTMLCanvasElement>("usage-scale"));
    this.redraw();
  }

  private draw(): void {
    const { written } = this;
    if (!written) return;
    for (const { name, heatmap, ratios } of Object.values(this.sides)) {
      if (!ratios) continue;
      heatmap.draw({
        rows: written.moe_layers.length,
        columns: written.n_experts,
        ratios,
        rowLabel: (row) => String(written.moe_layers[row]),
        columnLabel: String,
        rowTitle: "layer",
        columnTitle: "expert",
        columnBorders: [],
        rowBorders: [],
        markedRow: this.layer,
        markedColumn: null,
        markedCell: false,
      });
      const what = `Load of the experts in ${name}: ${written.moe_layers.length} layers by ${written.n_experts} experts, ${deadCount(ratios)} without tokens.`;
      heatmap.canvas.setAttribute("aria-label", `${what} Arrow keys read cells, Enter chooses the layer.`);
    }
  }

  private hover(heatmap: Heatmap, cell: Cell | null): void {
    for (const side of Object.values(this.sides)) if (side.heatmap !== heatmap) side.heatmap.focus = cell;
    this.redraw();
    setText(byId("usage-readout"), cell ? this.reading(cell) : "");
  }

  private reading({ row, column }: Cell): string {
    const written = this.written!;
    const at = row * written.n_experts + column;
    const parts = Object.values(this.sides).flatMap(({ name, ratios }) => (ratios ? [`${name} ${this.share(ratios[at])}`] : []));
    return `layer ${written.moe_layers[row]}, expert ${column}: ${parts.join(" · ")}`;
  }

  /** A ratio to the fair share, and as a share of the layer's choices. */
  private share(ratio: number): string {
    return Number.isNaN(ratio) ? "–" : `${percent(ratio / this.written!.n_experts)} (${metric(ratio)}×)`;
  }

  private rows(): { head: string[]; rows: string[][] } {
    const { written, sides } = this;
    if (!written) return { head: [], rows: [] };
    const rows = written.usage.flatMap((counts, row) =>
      counts.map((count, expert) => {
        const at = row * written.n_experts + expert;
        return [written.moe_layers[row], expert, count, this.share(sides.here.ratios![at]), sides.training.ratios ? this.share(sides.training.ratios[at]) : "–"].map(String);
      }),
    );
    return { head: ["layer", "expert", "tokens", "of this text", "of training"], rows };
  }
}
