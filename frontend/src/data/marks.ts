/** Marks on the time axis, from events. */
import type { RunEvent, SpikeLayer } from "./types";

export interface Spike {
  step: number;
  loss: number;
  median: number;
  deviation: number;
  score: number;
  router: SpikeLayer[];
}

export interface ValPoint {
  step: number;
  loss: number;
}

const marksOf = <T>(events: RunEvent[], kind: string): T[] => events.filter((event) => event.kind === kind).map((event) => ({ ...event.body, step: event.step }) as T);

export const spikesOf = (events: RunEvent[]): Spike[] => marksOf<Spike>(events, "spike_detected");

export const valPoints = (events: RunEvent[]): ValPoint[] => marksOf<ValPoint>(events, "eval_done");

/** The layer whose router changed most at a spike: where MaxVio rose furthest. */
export function worstLayer(spike: Spike): SpikeLayer | undefined {
  const rise = (layer: SpikeLayer) => layer.max_vio - (layer.max_vio_before ?? layer.max_vio);
  return spike.router.reduce<SpikeLayer | undefined>((worst, layer) => (!worst || rise(layer) > rise(worst) ? layer : worst), undefined);
}
