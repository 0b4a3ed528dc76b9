/** The text of a generation: each token coloured by its first expert, and beside it all of its experts and gates. */
import { metric, percent } from "../data/format";
import { hueOf, visible, type Written } from "../data/generation";
import { initBehind } from "./behind";
import { byId, el, setText } from "./dom";

const MOVES: Record<string, number> = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, PageUp: -50, PageDown: 50, Home: -Infinity, End: Infinity };

export class WrittenText {
  layer = 0;
  private written: Written | null = null;
  private tokens: HTMLElement[] = [];
  private chosen = -1;
  private readonly box = byId("written-text");

  constructor() {
    this.box.addEventListener("pointerover", (event) => this.show(this.placeOf(event.target)));
    this.box.addEventListener("pointerleave", () => this.show(this.chosen));
    this.box.addEventListener("click", (event) => this.choose(this.placeOf(event.target)));
    this.box.addEventListener("focusin", (event) => this.choose(this.placeOf(event.target)));
    this.box.addEventListener("keydown", (event) => this.move(event));
    initBehind(byId("written"), () => this.rows());
  }

  draw(written: Written): void {
    this.written = written;
    this.chosen = -1;
    this.tokens = written.texts.map((text, place) => {
      const prompt = place < written.prompt_tokens ? " prompt" : "";
      return el("span", { className: `token${prompt}`, role: "option", tabIndex: place ? -1 : 0, "data-place": place, "aria-selected": "false" }, visible(text));
    });
    this.box.replaceChildren(...this.tokens);
    this.colour(Math.min(this.layer, Math.max(written.moe_layers.length - 1, 0)));
  }

  /** Colours by the layer in that row. */
  colour(layer: number): void {
    const { written } = this;
    this.layer = layer;
    if (!written) return;
    for (const [place, token] of this.tokens.entries()) {
      const experts = written.experts[place][layer] ?? [];
      token.classList.toggle("routed", experts.length > 0);
      if (experts.length) token.style.setProperty("--hue", String(hueOf(experts[0], written.n_experts)));
      token.setAttribute("aria-label", `token ${place}, ${said(written.texts[place])}${this.spoken(experts)}`);
    }
    this.show(this.chosen);
  }

  private spoken(experts: number[]): string {
    const { written } = this;
    if (!written?.moe_layers.length) return "";
    const where = ` in layer ${written.moe_layers[this.layer]}`;
    return experts.length ? `, expert ${experts.join(" and ")}${where}` : `, no expert${where}`;
  }

  private placeOf(target: EventTarget | null): number {
    const token = (target as Element | null)?.closest<HTMLElement>(".token");
    return token && this.box.contains(token) ? Number(token.dataset.place) : -1;
  }

  private move(event: KeyboardEvent): void {
    const move = MOVES[event.key];
    if (move === undefined || !this.tokens.length) return;
    event.preventDefault();
    const to = Math.min(Math.max(Math.max(this.chosen, 0) + move, 0), this.tokens.length - 1);
    this.tokens[to].focus();
  }

  private choose(place: number): void {
    if (place < 0 || place === this.chosen) return;
    for (const [at, on] of [[this.chosen, false], [place, true]] as const) {
      if (at < 0) continue;
      this.tokens[at].setAttribute("aria-selected", String(on));
      this.tokens[at].tabIndex = on ? 0 : -1;
    }
    // The first token was the one that the Tab key reaches; now it is the chosen one.
    if (place) this.tokens[0].tabIndex = -1;
    this.chosen = place;
    this.show(place);
  }

  private show(place: number): void {
    const { written } = this;
    if (!written || place < 0) return;
    const logProb = written.log_probs[place];
    setText(byId("token-title"), said(written.texts[place]));
    const drawn = logProb === null ? "" : ` · log-prob ${metric(logProb)} (${logProb < Math.log(0.0005) ? "below 0.1 %" : percent(Math.exp(logProb))})`;
    setText(byId("token-figures"), `token ${place} · id ${written.ids[place]}${drawn}`);
    byId("token-layers").replaceChildren(...written.moe_layers.map((layer, row) => this.layerRow(place, layer, row)));
  }

  private layerRow(place: number, layer: number, row: number): HTMLElement {
    const { written } = this;
    const experts = written!.experts[place][row];
    const gates = written!.gates[place][row];
    const chips = experts.map((expert, i) => {
      const chip = el("span", { className: "expert-chip", title: `expert ${expert}, gate ${gates[i]}` }, el("b", {}, expert), ` ${gates[i].toFixed(2)}`);
      chip.style.setProperty("--hue", String(hueOf(expert, written!.n_experts)));
      return chip;
    });
    const none = experts.length ? null : el("span", { className: "muted" }, "none: every expert that it chose was full, or none chose it");
    return el("div", { className: row === this.layer ? "token-layer chosen" : "token-layer" }, el("span", { className: "muted num" }, `layer ${layer}`), el("span", { className: "chips" }, ...chips, none));
  }

  private rows(): { head: string[]; rows: string[][] } {
    const { written } = this;
    if (!written) return { head: [], rows: [] };
    const head = ["token", "text", "id", "log-prob", ...written.moe_layers.map((layer) => `layer ${layer}: expert (gate)`)];
    const rows = written.texts.map((text, place) => {
      const layers = written.experts[place].map((experts, row) => experts.map((expert, i) => `${expert} (${written.gates[place][row][i].toFixed(2)})`).join(", ") || "none");
      return [String(place), said(text), String(written.ids[place]), metric(written.log_probs[place]), ...layers];
    });
    return { head, rows };
  }
}

/** A token's text in words where it has none to see. */
function said(text: string): string {
  if (text === "") return "(part of a character, or a control token)";
  const named: Record<string, string> = { " ": "(space)", "\n": "(new line)", "\t": "(tab)" };
  return named[text] ?? `“${text}”`;
}
