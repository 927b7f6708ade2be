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
  overflow-wrap: anywhere; min-width: 4rem; vertical-align: bottom; }
  th:first-child, td:first-child,
  .words { text-align: left; } thead th { font-weight: 600; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .8rem; }
""".strip()
