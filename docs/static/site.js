// Draw the plotly figures of a page. The library (some megabytes, kept in the site) is fetched only where there is one.
(function () {
  'use strict';
  function colours() {
    const dark = document.documentElement.dataset.theme === 'dark';
    return { paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', font: { color: dark ? '#ced6dd' : '#222832' } };
  }
  function draw(holder) {
    const figure = JSON.parse(holder.querySelector('script').textContent);
    const layout = Object.assign({}, figure.layout, colours(), { autosize: true });
    delete layout.width;
    const target = document.createElement('div');
    holder.appendChild(target);
    window.Plotly.newPlot(target, figure.data, layout, Object.assign({ responsive: true, displaylogo: false }, figure.config));
  }
  function start() {
    const holders = document.querySelectorAll('.plotly-figure');
    if (!holders.length) return;
    const script = document.createElement('script');
    script.src = (document.documentElement.dataset.content_root || './') + '_static/plotly.min.js';
    script.onload = function () {
      holders.forEach(draw);
      new MutationObserver(function () {
        holders.forEach(function (holder) { window.Plotly.relayout(holder.lastElementChild, colours()); });
      }).observe(document.documentElement, { attributes: true, attributeFilter: ['data-theme'] });
    };
    document.head.appendChild(script);
  }
  if (document.readyState === 'loading') document.addEventListener('DOMContentLoaded', start); else start();
})();

// The landing page's chooser: buttons hide the routes that do not fit. Without a script all routes stand there.
(function () {
  'use strict';
  function start() {
    const chooser = document.querySelector('.chooser');
    if (!chooser) return;
    const chosen = {};
    function filter() {
      document.querySelectorAll('.route').forEach(function (route) {
        route.hidden = Object.keys(chosen).some(function (key) { return chosen[key] && !route.dataset[key].split(' ').includes(chosen[key]); });
      });
    }
    chooser.hidden = false;
    chooser.querySelectorAll('button').forEach(function (button) {
      const key = button.parentElement.dataset.key;
      button.setAttribute('aria-pressed', 'false');
      button.addEventListener('click', function () {
        chosen[key] = chosen[key] === button.dataset.value ? '' : button.dataset.value;
        button.parentElement.querySelectorAll('button').forEach(function (other) {
          other.setAttribute('aria-pressed', String(chosen[key] === other.dataset.value));
        });
        filter();
      });
    });
  }
  if (document.readyState === 'loading') document.addEventListener('DOMContentLoaded', start); else start();
})();
