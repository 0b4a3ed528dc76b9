/** Pointer and keyboard on the heatmap: one cell has the focus; Enter or a click chooses it. */
import type { Cell, Heatmap } from "./heatmap";

export interface CellActions {
  hover: (cell: Cell | null) => void;
  choose: (cell: Cell) => void;
}

const MOVES: Record<string, [number, number]> = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [-8, 0], PageDown: [8, 0] };

export function initCells(canvas: HTMLCanvasElement, heatmap: Heatmap, actions: CellActions): void {
  const focus = (cell: Cell | null) => {
    heatmap.focus = cell;
    actions.hover(cell);
  };
  canvas.addEventListener("pointermove", (event) => focus(heatmap.cellAt(event.offsetX, event.offsetY)));
  canvas.addEventListener("pointerleave", () => document.activeElement !== canvas && focus(null));
  canvas.addEventListener("blur", () => focus(null));
  canvas.addEventListener("click", (event) => {
    const cell = heatmap.cellAt(event.offsetX, event.offsetY);
    if (cell) actions.choose(cell);
  });
  canvas.addEventListener("keydown", (event) => {
    const picture = heatmap.picture;
    if (!picture) return;
    if (event.key === "Enter" && heatmap.focus) return actions.choose(heatmap.focus);
    const move = MOVES[event.key];
    if (!move) return;
    event.preventDefault();
    if (!heatmap.focus) return focus({ row: 0, column: 0 });
    const { row, column } = heatmap.focus;
    const within = (value: number, size: number) => Math.min(Math.max(value, 0), size - 1);
    focus({ row: within(row + move[0], picture.rows), column: within(column + move[1], picture.columns) });
  });
}
