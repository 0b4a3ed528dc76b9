/** Builds one bundle per page into dist/, with the manifest that the template tag `{% vite %}` reads. */
import { defineConfig } from "vite";

const pages = ["app", "runs", "run", "new", "compare", "tokens", "workers", "generate"];

export default defineConfig({
  base: "/static/",
  build: {
    target: "es2022",
    manifest: true,
    cssTarget: ["chrome123", "firefox128", "safari17.5"],
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    rolldownOptions: {
      input: Object.fromEntries(pages.map((page) => [page, `src/page/${page}.ts`])),
      onwarn(warning, warn) {
        // htmx can evaluate attributes as code; we switch that off (allowEval: false) and the policy forbids it.
        if (warning.code !== "EVAL") warn(warning);
      },
    },
  },
});
