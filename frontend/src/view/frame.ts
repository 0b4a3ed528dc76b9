/** One redraw per animation frame, however often something asks for it, and none while nobody can see it. */

export function perFrame(draw: () => void): () => void {
  let waiting = 0;
  return () => {
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      draw();
    });
  };
}

/** Calls `act` once things have been quiet for `ms`. */
export function debounced<A extends unknown[]>(ms: number, act: (...args: A) => void): (...args: A) => void {
  let timer = 0;
  return (...args) => {
    clearTimeout(timer);
    timer = window.setTimeout(() => act(...args), ms);
  };
}

/** Calls `act` at most once in `ms`, the last call included. */
export function throttled(ms: number, act: () => void): () => void {
  let timer = 0;
  let last = 0;
  return () => {
    if (timer) return;
    timer = window.setTimeout(
      () => {
        timer = 0;
        last = Date.now();
        act();
      },
      Math.max(0, last + ms - Date.now()),
    );
  };
}

/** Calls `draw` when `node` changes size, and tells whether it is on the screen. */
export function watchSize(node: Element, draw: () => void): { visible: () => boolean } {
  let visible = false;
  new ResizeObserver(draw).observe(node);
  new IntersectionObserver(
    (entries) => {
      const was = visible;
      visible = entries[entries.length - 1].isIntersecting;
      if (visible && !was) draw();
    },
    { rootMargin: "200px" },
  ).observe(node);
  return { visible: () => visible };
}
