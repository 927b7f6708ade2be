"""One look for every page: light and dark screens, phones and paper."""

STYLE = """
:root { --ink: #1a1d21; --soft: #5c6570; --line: #d9dee4; --paper: #ffffff; --card: #f6f8fa;
  --blue: #0067a8; --orange: #c04a00; --green: #00795a; --grey: #6f7a86; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #a3adb8; --line: #3a424b;
  --paper: #14171a; --card: #1d2226; --blue: #5db4ea; --orange: #f59a57; --green: #4cc9a0;
  --grey: #9aa5b1; } }
@media print { :root { --ink: #000; --soft: #444; --line: #ccc; --paper: #fff; --card: #fff;
  --blue: #0067a8; --orange: #c04a00; --green: #00795a; --grey: #6f7a86; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.25rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--soft); margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.verdict { border-left: 5px solid var(--tone); padding: .1rem 0 .1rem 1rem; margin: 1rem 0; }
.verdict strong { font-size: 1.7rem; line-height: 1.2; color: var(--tone); display: block;
  overflow-wrap: anywhere; }
.good { --tone: var(--green); } .bad { --tone: var(--orange); } .odd { --tone: var(--blue); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem;
  margin: 1rem 0; padding: 0; list-style: none; }
.facts li { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .55rem .75rem; }
.facts b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.facts span, figcaption, .key, footer { color: var(--soft); font-size: .88rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr));
  gap: 1rem; }
figure { margin: 0; break-inside: avoid; } figure.wide { max-width: 38rem; }
.scroll { margin-top: 1rem; } .pair > figure { max-width: 26rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; font-family: inherit; }
svg .note { font-size: 11px; } .grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--grey); stroke-width: 1; } .band { fill: var(--grey); opacity: .13; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.before { stroke: var(--orange); } .after { stroke: var(--blue); }
.fresh { stroke: var(--grey); stroke-dasharray: 5 4; } .fresh-dot { fill: var(--grey); }
.before-dot { fill: var(--orange); } .limit { stroke: var(--grey); stroke-dasharray: 2 3; }
.head { stroke: var(--blue); stroke-width: 1.3; opacity: .75; }
.head.blamed { stroke: var(--orange); opacity: .95; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0; padding: 0;
  list-style: none; } .key svg { width: 28px; height: 10px; display: inline-block;
  margin-right: .4rem; vertical-align: middle; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem;
  font-variant-numeric: tabular-nums; } caption { text-align: left; color: var(--soft);
  padding-bottom: .3rem; } th, td { padding: .3rem .8rem .3rem 0; text-align: right;
  border-bottom: 1px solid var(--line); white-space: nowrap; } thead th { white-space: normal;
  min-width: 3rem; vertical-align: bottom; }
  th:first-child, td:first-child,
  .words { text-align: left; } thead th { font-weight: 600; }
.scroll:focus-visible, .plot:focus-visible, .text:focus-visible { outline: 2px solid var(--blue);
  outline-offset: 2px; border-radius: 4px; }
/* Series: colours apart in lightness too; shapes and dashes say the same. */
:root { --c0: #0067a8; --c1: #c04a00; --c2: #00795a; --c3: #8a3fa0; --c4: #8a6a00; --c5: #c2185b;
  --c6: #4b5563; --c7: #0b7285; }
@media (prefers-color-scheme: dark) { :root { --c0: #5db4ea; --c1: #f59a57; --c2: #4cc9a0;
  --c3: #cf9be3; --c4: #e0bd4b; --c5: #ff8fb1; --c6: #b6c0cc; --c7: #6fd3e3; } }
@media print { :root { --c0: #0067a8; --c1: #c04a00; --c2: #00795a; --c3: #8a3fa0; --c4: #8a6a00;
  --c5: #c2185b; --c6: #4b5563; --c7: #0b7285; } }
.s0 { stroke: var(--c0); --k: var(--c0); } .s1 { stroke: var(--c1); --k: var(--c1); }
.s2 { stroke: var(--c2); --k: var(--c2); } .s3 { stroke: var(--c3); --k: var(--c3); }
.s4 { stroke: var(--c4); --k: var(--c4); } .s5 { stroke: var(--c5); --k: var(--c5); }
.s6 { stroke: var(--c6); --k: var(--c6); } .s7 { stroke: var(--c7); --k: var(--c7); }
.k0 { --k: var(--c0); } .k1 { --k: var(--c1); } .k2 { --k: var(--c2); } .k3 { --k: var(--c3); }
.k4 { --k: var(--c4); } .k5 { --k: var(--c5); } .k6 { --k: var(--c6); } .k7 { --k: var(--c7); }
.d1 { stroke-dasharray: 6 3; } .mark, .dot, .part { fill: var(--k); stroke: var(--paper);
  stroke-width: 1; } .whisker { stroke-width: 1.2; opacity: .6; } polyline[class^="s"] {
  stroke-width: 1.8; } .hair { stroke: var(--grey); stroke-width: 1; stroke-dasharray: 2 2; }
.part { stroke-width: .8; } text.inside { fill: var(--paper); }
.plot { position: relative; touch-action: pan-y; } .plot svg { overflow: visible; }
.tip { position: absolute; top: 4px; z-index: 2;
  margin: 0 .5rem; padding: .35rem .55rem; max-width: 70%; background: var(--paper);
  border: 1px solid var(--line); border-radius: 6px; box-shadow: 0 2px 8px #0003; font-size: .78rem;
  line-height: 1.35; pointer-events: none; } .tip b, .tip span { display: block; }
.tip span { border-left: 3px solid var(--k); padding-left: .35rem; }
.tip i { font-style: normal; color: var(--soft); overflow-wrap: anywhere; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.key .mark { stroke: none; } .key li { overflow-wrap: anywhere; }
details { margin: .4rem 0; } summary { cursor: pointer; color: var(--soft); font-size: .88rem; }
.brand { display: flex; justify-content: space-between; gap: 1rem; flex-wrap: wrap; }
.page h1 { font-size: 1.7rem; color: var(--ink); line-height: 1.2; margin: .8rem 0 .3rem; }
.page > section { margin-top: 2.6rem; border-top: 1px solid var(--line); }
.page > section > h2 { margin-top: 1.2rem; font-size: 1.35rem; } h3 { font-size: 1rem;
  margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; } .page nav ul { display: flex; flex-wrap: wrap;
  gap: .3rem .5rem; padding: 0; margin: .8rem 0; list-style: none; } .page nav a { display: block;
  border: 1px solid var(--line); border-radius: 99px; padding: .15rem .75rem; font-size: .88rem;
  text-decoration: none; color: var(--ink); background: var(--card); } a { color: var(--blue); }
.page h2 { overflow-wrap: anywhere; } .soft { color: var(--soft); font-size: .88rem;
  overflow-wrap: anywhere; } .figures { display: grid; gap: 1.6rem 1.4rem; margin-top: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.figures > * { min-width: 0; max-width: 38rem; }
.facts span { overflow-wrap: anywhere; } .small { grid-template-columns: repeat(auto-fill,
  minmax(min(45%, 9.5rem), 1fr)); gap: .8rem; } figcaption b { color: var(--ink); }
figcaption, summary, caption, .tip { overflow-wrap: anywhere; }
.heat td, .heat thead th { text-align: center; padding: .3rem .1rem; min-width: 2rem; }
.heat td { border: 2px solid var(--paper); border-radius: 4px; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; background: color-mix(in srgb, var(--c0) var(--p),
  var(--card)); } .heat .dark { color: var(--paper); }
.best { font-weight: 700; } .best::after { content: " ★"; font-size: .75em; color: var(--c0); }
.text { font: 15px/2 Georgia, "Times New Roman", serif; white-space: pre-wrap; padding: .6rem .8rem;
  border: 1px solid var(--line); border-radius: 8px; max-width: 46rem; max-height: 24rem;
  overflow-y: auto; overflow-wrap: anywhere; margin: .6rem 0; }
.text span { border-radius: 2px; padding: .15em 0;
  border-bottom: 3px solid transparent; -webkit-print-color-adjust: exact;
  print-color-adjust: exact; } .text .q0 { color: var(--soft); opacity: .85; }
.text .q1 { border-color: color-mix(in srgb, var(--c1) 20%, transparent); }
.text .q2 { border-color: color-mix(in srgb, var(--c1) 40%, transparent); }
.text .q3 { border-color: color-mix(in srgb, var(--c1) 65%, transparent); }
.text .q4 { border-color: var(--c1); }
.text .q5 { border-color: var(--c1); background: color-mix(in srgb, var(--c1) 22%, transparent);
  font-weight: 600; } .text .later { opacity: .35; } .text .on { outline: 2px solid var(--blue); }
.controls { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; }
.controls[hidden] { display: none; } .controls label { font-size: .88rem; color: var(--soft); }
.controls input { width: min(20rem, 100%); vertical-align: middle; accent-color: var(--c1); }
select { font: inherit; font-size: .88rem; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: 4px; }
.named { min-height: 1.5em; font-size: .9rem; margin: .3rem 0; overflow-wrap: anywhere; }
.map { background: var(--card); border: 1px solid var(--line);
  border-radius: 4px; } .map path { fill: var(--c1); stroke: none; }
@media print { .controls, nav, .read details { display: none !important; }
  .text { max-height: none; } .figures > .scroll, .facts { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; opacity: 1; }
  body { max-width: none; padding: 0; } .scroll { overflow: visible; } }
@media (max-width: 30rem) { .page h1 { font-size: 1.4rem; } th, td { padding-right: .6rem; } }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .8rem; }
""".strip()
