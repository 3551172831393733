"""The style sheet of the HTML pages, inlined under a hash. Colours: Okabe-Ito, with shape and word beside them; errors
of layers on one hue from light to dark, which is told apart without colour as well."""

_LIGHT = """
  --page: #faf9f7; --card: #ffffff; --ink: #1b2026; --soft: #59636d; --line: #e4e1db; --head: #f5f3ef;
  --good: #0072b2; --bad: #b34700; --even: #59636d; --open: #8a5a83; --noise: #00000014; --accent: #0072b2;
  --beyond: #b3470012; --band: #0072b226; --edge: #1b202647; --on: #ffffff; --on3: #000; --on4: #000; --on5: #fff;
  --h0: #eef3f8; --h1: #d3e3f0; --h2: #acccdf; --h3: #7fafcb; --h4: #4f8fb5; --h5: #2a6c97; --h6: #134a72;
  --p0: #0072b2; --p1: #56b4e9; --p2: #009e73; --p3: #b8860b; --p4: #d55e00; --p5: #a8577e; --p6: #6b7680;
  --p7: #a3abb2; --p8: #ccd1d5;
"""
_DARK = """
  --page: #121518; --card: #191d21; --ink: #e7e9eb; --soft: #9ca6af; --line: #2d3339; --head: #20252a;
  --good: #56b4e9; --bad: #f0903c; --even: #9ca6af; --open: #cc9fc4; --noise: #ffffff1f; --accent: #56b4e9;
  --beyond: #f0903c1a; --band: #56b4e933; --edge: #000000b3; --on: #0b0e10; --on3: #fff; --on4: #000; --on5: #000;
  --h0: #1f2930; --h1: #213a4a; --h2: #225067; --h3: #276a89; --h4: #3b8bb0; --h5: #6db3d4; --h6: #b9e0f2;
  --p0: #56b4e9; --p1: #2f7fb0; --p2: #2fbf97; --p3: #e0b040; --p4: #f0903c; --p5: #cc9fc4; --p6: #9ca6af;
  --p7: #66717a; --p8: #444d55;
"""
_PRINT = """
  --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --head: #eee;
  --good: #00507d; --bad: #8a3700; --even: #444; --open: #5c3a57; --noise: #0000001a; --accent: #00507d;
"""
STYLE = (
    """
:root { color-scheme: light dark;"""
    + _LIGHT
    + """}
@media (prefers-color-scheme: dark) { :root {"""
    + _DARK
    + """} }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main, header, nav { max-width: 70rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 3rem; }
footer { max-width: 70rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; color: var(--soft); font-size: .85rem; }
.brand { margin: 0; color: var(--soft); font-size: .78rem; letter-spacing: .09em; text-transform: uppercase; }
h1 { margin: .2rem 0 1.1rem; font-size: 2rem; line-height: 1.2; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 0 0 .9rem; font-size: 1.3rem; line-height: 1.3; font-weight: 650; }
h3 { margin: 0 0 .7rem; font-size: 1.02rem; line-height: 1.35; font-weight: 600; }
.verdict {
  max-width: 56rem; margin: 0 0 1.6rem; padding-left: 1rem; border-left: 4px solid var(--accent);
  font-size: 1.12rem; line-height: 1.5; overflow-wrap: anywhere;
}
.verdict::first-letter { text-transform: uppercase; }
.verdict.failed { border-left-color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .8rem; margin: 0 0 1.6rem; }
.tiles > div {
  padding: .8rem 1rem .9rem; background: var(--card); border: 1px solid var(--line);
  border-top: 3px solid var(--even); border-radius: 6px; overflow-wrap: anywhere;
}
.tiles dt { color: var(--soft); font-size: .82rem; }
.tiles dd { margin: 0; }
.tiles .value { font-size: 1.75rem; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tiles .detail { margin-top: .2rem; color: var(--soft); font-size: .82rem; line-height: 1.4; }
.tiles .good { border-top-color: var(--good); } .tiles .good .value { color: var(--good); }
.tiles .bad { border-top-color: var(--bad); } .tiles .bad .value { color: var(--bad); }
.tiles .open { border-top-color: var(--open); } .tiles .open .value { color: var(--open); }
.tiles .quiet .value { color: var(--soft); font-weight: 450; font-size: 1.3rem; line-height: 1.7; }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 2.2rem; margin: 0; font-size: .88rem; }
.facts div { min-width: 0; overflow-wrap: anywhere; }
.facts dt { color: var(--soft); font-size: .78rem; }
.facts dd { margin: 0; }
nav { margin-top: 1.4rem; }
nav ul {
  display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; margin: 0; padding: .7rem 0; list-style: none; font-size: .9rem;
  border-top: 1px solid var(--line); border-bottom: 1px solid var(--line);
}
a { color: var(--accent); text-underline-offset: 3px; text-decoration-thickness: 1px; }
section { margin: 2.6rem 0 0; min-width: 0; }
.group { margin-top: 3.4rem; padding-top: 1.6rem; border-top: 1px solid var(--line); }
.group > h2 { margin: 0; font-size: 1.5rem; }
.group > section { margin-top: 1.9rem; }
.next, .warnings {
  padding: .9rem 1.2rem 1rem; border: 1px solid var(--line); border-radius: 6px; background: var(--card);
}
header .next { margin: 0 0 1.6rem; }
.next { border-left: 4px solid var(--accent); }
.warnings { margin-top: 1rem; border-left: 4px solid var(--bad); }
.next h2, .warnings h2 { margin-bottom: .4rem; font-size: 1.02rem; }
.next ul, .warnings ul {
  max-width: 60rem; margin: 0; padding-left: 1.1rem; overflow-wrap: anywhere; font-size: .94rem;
}
.next li, .warnings li { margin: .2rem 0; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.scroll {
  width: fit-content; min-width: min(100%, 32rem); max-width: 100%; overflow-x: auto;
  border: 1px solid var(--line); border-radius: 6px;
  background: /* a shadow where there is more to the side: the first two scroll along and cover it at the ends */
    linear-gradient(to right, var(--card) 40%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--card) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to right, var(--edge), transparent) left / 1.1rem 100% no-repeat scroll,
    linear-gradient(to left, var(--edge), transparent) right / 1.1rem 100% no-repeat scroll,
    var(--card);
}
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { width: 100%; border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .48rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--head); color: var(--soft); font-weight: 550; font-size: .92em; vertical-align: bottom; }
tbody th { font-weight: 550; background: var(--card); }
th.key { position: sticky; left: 0; }
.r { text-align: right; white-space: nowrap; }
thead .r { white-space: normal; }
td { min-width: 4.2rem; }
td.l, th.key { overflow-wrap: break-word; }
tbody td.l, tbody th.key { max-width: 26rem; }
.named tbody th.key { min-width: 9rem; }
td.long { min-width: 13rem; }
.interval { color: var(--soft); font-size: .94em; }
#layers table, #passes table { font-size: .8rem; }
#layers tbody .r { white-space: normal; }
#worst td, #worst th.key { font-size: .94em; }
#worst td.l { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .84em; }
#worst td.long { min-width: 8rem; } #worst td:nth-child(2) { min-width: 13rem; }
#heat table { font-size: .8rem; }
#heat th, #heat td { padding: .25rem .6rem; border-bottom: 0; }
#heat .interval { color: inherit; }
#quality .interval, #continuations .interval, #variants .interval { display: block; }
.facts-table tbody th { width: 15rem; color: var(--soft); font-weight: 450; }
.facts-table tbody td.l { max-width: none; overflow-wrap: anywhere; }
.faster, td.met { color: var(--good); font-weight: 600; }
.slower, .FAILED, .NO { color: var(--bad); font-weight: 600; }
.inconclusive { color: var(--open); font-weight: 600; }
.same { color: var(--even); font-weight: 600; }
.quiet { color: var(--soft); }
.notes {
  max-width: 60rem; margin: .6rem 0 0; padding: 0; list-style: none; color: var(--soft); font-size: .82rem;
  overflow-wrap: anywhere;
}
summary { cursor: pointer; width: fit-content; padding: .3rem 0; color: var(--accent); font-size: .88rem; }
details[open] > summary { margin-bottom: .4rem; }
figure { margin: 0 0 1.1rem; max-width: 50rem; }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .82rem; }
.chart { display: block; overflow: visible; }
.chart text { fill: var(--ink); font-size: 13px; paint-order: stroke; stroke: var(--page); stroke-width: 5px; }
.chart .axis { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.chart .name { fill: var(--soft); font-size: 12px; }
.chart .value { font-variant-numeric: tabular-nums; }
.chart .tick { stroke: var(--line); }
.chart .one { stroke: var(--ink); stroke-dasharray: 4 3; }
.chart .noise { fill: var(--noise); }
.chart g g line { stroke: currentColor; stroke-width: 2; }
.chart path { fill: currentColor; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.chart .inconclusive path, .chart .same path { fill: var(--page); }
.front .beyond { fill: var(--beyond); }
.front .step { stroke: var(--accent); stroke-opacity: .45; stroke-width: 1.5; }
.front .whisker { stroke: var(--accent); stroke-width: 2; stroke-opacity: .75; }
.front .whisker.baseline { stroke: var(--even); } .front .whisker.dominated { stroke: var(--even); stroke-opacity: .5; }
.mark circle, .mark rect { fill: var(--accent); stroke: var(--page); stroke-width: 1.5; }
.mark.baseline rect { fill: var(--even); }
.mark.recommended .star { fill: var(--accent); stroke: var(--page); stroke-width: 1.5; }
.front .chosen { font-weight: 650; }
.mark.dominated circle { fill: var(--page); stroke: var(--even); stroke-width: 2; }
.mark.predicted circle { fill: var(--page); stroke: var(--accent); stroke-width: 1.5; stroke-dasharray: 3 2; }
.mark.predicted path { stroke-width: 1.3; color: var(--accent); }
.mark circle.ring { fill: none; stroke: var(--open); stroke-width: 2; }
.curve .line { stroke: var(--accent); stroke-width: 2; } .curve .dot { fill: var(--accent); }
.curve .band { fill: var(--band); }
.spans .before { fill: var(--page); stroke: currentColor; stroke-width: 2; }
.spans .after { fill: currentColor; stroke: currentColor; stroke-width: 2; }
.operators .before { fill: var(--even); fill-opacity: .45; } .operators .after { fill: var(--accent); }
.heat rect.worst { stroke: var(--bad); stroke-width: 2; }
.heat .unknown { fill: none; stroke: var(--line); }
rect.h0 { fill: var(--h0); } rect.h1 { fill: var(--h1); } rect.h2 { fill: var(--h2); } rect.h3 { fill: var(--h3); }
rect.h4 { fill: var(--h4); } rect.h5 { fill: var(--h5); } rect.h6 { fill: var(--h6); }
td.h0 { background: var(--h0); } td.h1 { background: var(--h1); } td.h2 { background: var(--h2); }
td.h3 { background: var(--h3); color: var(--on3); } td.h4 { background: var(--h4); color: var(--on4); }
td.h5 { background: var(--h5); color: var(--on5); } td.h6 { background: var(--h6); color: var(--on5); }
.p0 { fill: var(--p0); } .p1 { fill: var(--p1); } .p2 { fill: var(--p2); } .p3 { fill: var(--p3); }
.p4 { fill: var(--p4); } .p5 { fill: var(--p5); } .p6 { fill: var(--p6); } .p7 { fill: var(--p7); }
.p8 { fill: var(--p8); }
.chart text.on { fill: var(--on); stroke: none; font-weight: 600; }
pre {
  margin: 0; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
@media (min-width: 60rem) {
  #quality th.key { min-width: 11rem; }
  .group { display: grid; grid-template-columns: 1fr 1fr; column-gap: 2.4rem; }
  .group > * { grid-column: 1 / -1; }
  .group > .half { grid-column: auto; }
}
@media (max-width: 40rem) {
  main, header, footer, nav { padding-left: 1rem; padding-right: 1rem; }
  header { padding-top: 1.5rem; }
  h1 { font-size: 1.5rem; }
  .verdict { font-size: 1rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: .6rem; }
  .tiles > div { padding: .6rem .75rem .7rem; }
  .tiles > div:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .tiles .value { font-size: 1.4rem; }
  .facts-table tbody th { width: 8rem; }
  th, td { padding: .42rem .6rem; }
}
@media print {
  :root {"""
    + _PRINT
    + """}
  body { font-size: 10pt; }
  main, header, footer, nav { max-width: none; padding: 0; }
  nav { display: none; }
  .scroll { overflow: visible; }
  table, #layers table { font-size: 8pt; }
  th, td { padding: .25rem .35rem; }
  td { min-width: 0; }
  th.key { position: static; }
  details::details-content { content-visibility: visible; block-size: auto; }
  rect, td, .tiles > div { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h2, h3 { break-after: avoid; }
  tr, figure, .verdict, .tiles > div, pre { break-inside: avoid; }
}
"""
)
