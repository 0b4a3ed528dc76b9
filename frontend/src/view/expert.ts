/** The chosen expert's history: its load over the steps, as a multiple of its fair share. */
import { firstSteps } from "../data/series";
import type { RunStore } from "../data/store";
import { byId, setText } from "./dom";
import { LineChart } from "./lines";
import { countsRow } from "./reading";

/** Until the reader chooses, the page follows the most loaded expert of the layer. */
function chooseFirst(store: RunStore): void {
  const row = store.expert === null ? countsRow(store) : undefined;
  const tokens = row?.tensors.expert_tokens?.subarray(store.layer * row.experts, (store.layer + 1) * row.experts);
  if (!tokens?.length) return;
  store.setExpert(tokens.indexOf(Math.max(...tokens) as never));
}

export function initExpert(store: RunStore): void {
  const figure = byId("expert");
  const chart = new LineChart(figure, store, {
    title: "Load of the chosen expert",
    yTitle: "× fair share",
    zeroBased: true,
    empty: () => store.failures.get("layer"),
    tick: (value) => `${Number(value.toFixed(2))}×`,
    format: (value) => `${value.toFixed(2)}×`,
    drawing: () => {
      const history = store.layerHistory;
      if (store.expert === null || !history?.length) return null;
      const x = history.step.subarray(0, history.length);
      const fair = new Float64Array(history.length).fill(1);
      const lines = [
        { label: "fair share", colour: "--ink-soft", faint: true, width: 1 },
        { label: `expert ${store.expert}`, colour: "--line-1" },
      ];
      return { x, first: firstSteps(history), lines, values: [fair, history.ratios(store.expert)], band: null };
    },
  });
  const show = () => {
    const { expert, layer, run } = store;
    setText(figure.querySelector("h3"), expert === null ? "Expert over time" : `Layer ${run.moe_layers[layer]}, expert ${expert} over time`);
    chart.redraw();
  };
  store.on(["expert", "layer"], show);
  store.on(["snapshot", "steps"], () => chooseFirst(store));
  show();
}
