// Cells of the table of runs, and the page's address, which names what is selected.
const element = (...parts) => window.React.createElement(...parts);
const path = name => name.split("/").map(encodeURIComponent).join("/");

const short = value => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(3).replace(/\.?0*e/, "e") : String(+value.toPrecision(5)));

window.dashAgGridFunctions = Object.assign(window.dashAgGridFunctions || {}, {
  number: value => (typeof value === "number" ? (Number.isInteger(value) ? value.toLocaleString("en") : short(value)) : value),
});

window.dashAgGridComponentFunctions = Object.assign(window.dashAgGridComponentFunctions || {}, {
  Status: ({ value }) => element("span", { className: "status " + value }, value),
  Name: ({ value, data }) =>
    element("a", { href: "/runs/" + path(value) + (data.report ? "/report.html" : "/"), title: value, onClick: event => event.stopPropagation() }, value),
  Objective: ({ value, data }) =>
    typeof value === "number" ? element("span", null, short(value), element("small", null, " " + data.metric)) : "",
});

window.hydratune = {
  address: (picked, filter, metrics) => {
    const query = new URLSearchParams();
    if (filter) query.append("filter", filter);
    for (const name of Object.keys(picked || {}).slice(0, 30)) query.append("run", name);
    for (const name of metrics || []) query.append("metric", name);
    history.replaceState(null, "", location.pathname + (query.size ? "?" + query : ""));
    return window.dash_clientside.no_update;
  },
};
