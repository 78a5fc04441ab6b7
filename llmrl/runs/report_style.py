"""The look of the report: one style sheet, light and dark, no fonts or pictures from elsewhere.

The series colours are Okabe and Ito's, which people with any common colour blindness can tell apart.
"""

STYLE = """
:root {
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --page: #fbfbfa; --card: #ffffff; --ink: #23262b; --soft: #61666e; --faint: #dfe1e4;
  --series-1: #0072b2; --series-2: #d55e00; --series-3: #00805c; --series-4: #a8488a;
  --good: #00694b; --bad: #a93f00; --mark: #eef4f8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --card: #1d2024; --ink: #e4e6e9; --soft: #a0a6ae; --faint: #363b42;
    --series-1: #56b4e9; --series-2: #f0935a; --series-3: #3fc79e; --series-4: #e0a3ca;
    --good: #4fcfa8; --bad: #f0935a; --mark: #222b32;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 var(--font); }
main { max-width: 1120px; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .4rem .9rem; }
h1 { font-size: 1.65rem; font-weight: 650; letter-spacing: -.015em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; font-weight: 650; margin: 2.4rem 0 .8rem; }
.status { font-size: .82rem; font-weight: 600; padding: .1rem .6rem; border-radius: 1rem;
  border: 1px solid currentColor; }
.completed { color: var(--good); } .failed { color: var(--bad); } .interrupted, .unknown { color: var(--soft); }
.reason { border-left: 3px solid var(--bad); padding: .2rem .9rem; margin: 1rem 0 0; overflow-wrap: anywhere; }
dl.facts { display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; margin: 1rem 0 0; }
dl.facts dt { color: var(--soft); font-size: .8rem; } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--faint); border-radius: 10px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: .8rem; color: var(--soft); }
th, td { padding: .45rem .9rem; border-bottom: 1px solid var(--faint); vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
th.number, td.number { text-align: right; white-space: nowrap; }
td .interval { color: var(--soft); font-size: .82rem; }
td.range { width: 230px; } td.range svg { display: block; width: 100%; height: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: .9rem; }
figure { margin: 0; padding: .7rem .8rem .4rem; }
figcaption { font-size: .86rem; font-weight: 600; display: flex; flex-wrap: wrap; gap: .1rem .9rem;
  align-items: baseline; }
figcaption .last { margin-left: auto; font-weight: 400; color: var(--soft); font-variant-numeric: tabular-nums; }
figcaption .key { font-weight: 400; color: var(--soft); white-space: nowrap; }
figcaption .key svg { width: 22px; height: 8px; margin-right: .3rem; vertical-align: middle; }
figure > svg { width: 100%; height: auto; display: block; }
.sample { padding: .9rem 1rem; margin-bottom: .9rem; }
.sample .prompt { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .7rem; font-weight: 550; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: .8rem; }
.answers h3 { font-size: .8rem; color: var(--soft); margin: 0 0 .25rem; font-weight: 600; }
.answers .text { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--mark); border-radius: 7px;
  padding: .6rem .8rem; font-size: .9rem; max-height: 22rem; overflow-y: auto; }
.right { color: var(--good); } .wrong { color: var(--bad); }
details { margin-top: .8rem; padding: .6rem 1rem; } summary { cursor: pointer; font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere;
  font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; margin: .7rem 0 .3rem; }
.empty { color: var(--soft); padding: 1rem; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .82rem; }
@media print { body { background: #fff; } details { display: none; } }
"""
