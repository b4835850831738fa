// Widget classes that the manager does not bring along are taken from this site, not from another host.
(function () {
  const root = document.documentElement.dataset.content_root || './';
  window.require = { paths: { anywidget: root + '_static/widgets/anywidget' } };
})();
