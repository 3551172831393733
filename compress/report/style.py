"""The style sheet of the HTML report, inlined under a hash. Colours: Okabe-Ito, with shape and word beside them."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --card: #ffffff; --ink: #1d2329; --soft: #5a646e; --line: #e3e0da; --head: #f4f2ee;
  --good: #0072b2; --bad: #b34700; --even: #5a646e; --open: #8a5a83; --noise: #00000014; --accent: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1b1f23; --ink: #e6e8ea; --soft: #9aa4ad; --line: #30363c; --head: #22272c;
    --good: #56b4e9; --bad: #f0903c; --even: #9aa4ad; --open: #cc9fc4; --noise: #ffffff1f; --accent: #56b4e9;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main, header { max-width: 68rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 3rem; }
footer { max-width: 68rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; color: var(--soft); font-size: .85rem; }
.brand { margin: 0; color: var(--soft); font-size: .8rem; letter-spacing: .08em; text-transform: uppercase; }
h1 { margin: .2rem 0 1.2rem; font-size: 1.9rem; line-height: 1.2; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 0 0 .8rem; font-size: 1.15rem; font-weight: 650; }
.verdict {
  margin: 0 0 1.4rem; padding: 1rem 1.2rem; background: var(--card); border: 1px solid var(--line);
  border-left: 5px solid var(--accent); border-radius: 6px; font-size: 1.1rem; overflow-wrap: anywhere;
}
.verdict::first-letter { text-transform: uppercase; }
.verdict.failed { border-left-color: var(--bad); }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin: 0 0 1rem; font-size: .9rem; }
.facts div { min-width: 0; overflow-wrap: anywhere; }
.facts dt { color: var(--soft); font-size: .78rem; }
.facts dd { margin: 0; }
section { margin: 2.4rem 0 0; }
hr { margin: 3.5rem 0 0; border: 0; border-top: 1px solid var(--line); }
.warnings {
  padding: .8rem 1.2rem; border: 1px solid var(--line); border-left: 5px solid var(--bad); border-radius: 6px;
}
.warnings ul { margin: 0; padding-left: 1.1rem; overflow-wrap: anywhere; }
.scroll {
  width: fit-content; min-width: min(100%, 36rem); max-width: 100%; overflow-x: auto;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px;
}
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--head); color: var(--soft); font-weight: 550; font-size: .92em; vertical-align: bottom; }
tbody th { font-weight: 550; background: var(--card); }
th.key { position: sticky; left: 0; }
.r { text-align: right; white-space: nowrap; }
thead .r { white-space: normal; }
td { min-width: 4.5rem; }
td.l, th.key { overflow-wrap: break-word; }
tbody td.l, tbody th.key { max-width: 26rem; }
#layers table { font-size: .82rem; }
#layers tbody .r { white-space: normal; }
.facts-table tbody th { width: 15rem; color: var(--soft); font-weight: 450; }
.facts-table tbody td.l { max-width: none; overflow-wrap: anywhere; }
.faster { color: var(--good); font-weight: 600; }
.slower, .FAILED, .NO { color: var(--bad); font-weight: 600; }
.inconclusive { color: var(--open); font-weight: 600; }
.same { color: var(--even); font-weight: 600; }
.quiet { color: var(--soft); }
.notes {
  margin: .6rem 0 0; padding: 0; list-style: none; color: var(--soft); font-size: .82rem; overflow-wrap: anywhere;
}
figure { margin: 0 0 1.2rem; max-width: 46rem; }
figcaption { margin-top: .3rem; color: var(--soft); font-size: .82rem; }
.chart { display: block; overflow: visible; }
.chart text { fill: var(--ink); font-size: 13px; paint-order: stroke; stroke: var(--page); stroke-width: 5px; }
.chart .axis { fill: var(--soft); font-size: 12px; font-weight: 400; }
.chart .tick { stroke: var(--line); }
.chart .one { stroke: var(--ink); stroke-dasharray: 4 3; }
.chart .noise { fill: var(--noise); }
.chart g g line { stroke: currentColor; stroke-width: 2; }
.chart path { fill: currentColor; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.chart .inconclusive path, .chart .same path { fill: var(--page); }
pre {
  margin: 0; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
@media (max-width: 40rem) {
  main, header, footer { padding-left: 1rem; padding-right: 1rem; }
  header { padding-top: 1.5rem; }
  h1 { font-size: 1.5rem; }
  .verdict { font-size: 1rem; }
  .facts-table tbody th { width: 8rem; }
  th, td { padding: .45rem .6rem; }
}
@media print {
  :root {
    --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --head: #eee;
    --good: #00507d; --bad: #8a3700; --even: #444; --open: #5c3a57; --noise: #0000001a; --accent: #00507d;
  }
  body { font-size: 10pt; }
  main, header, footer { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  table, #layers table { font-size: 8pt; }
  th, td { padding: .25rem .35rem; }
  td { min-width: 0; }
  th.key { position: static; }
  h2 { break-after: avoid; }
  tr, figure, .verdict, pre { break-inside: avoid; }
}
"""
