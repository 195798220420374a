/* Runs whenever the words below the picture are new: what ipywidgets has no trait for. */
const mark = (image, tries) => {
  const panel = image.closest('.kfac-panel');
  if (!panel) {  /* a notebook reopened beside its kernel runs this before the panel is on the page */
    if (tries) requestAnimationFrame(() => mark(image, tries - 1));
    return;
  }
  const picture = panel.querySelector('img.widget-image');
  if (picture) picture.alt = image.dataset.alt;
  const name = () => panel.querySelectorAll('.widget-slider').forEach(slider => {
    const handle = slider.querySelector('.noUi-handle'), text = slider.querySelector('.widget-readout');
    if (!handle) return;
    handle.setAttribute('aria-label', slider.querySelector('.widget-label').textContent);
    if (text) handle.setAttribute('aria-valuetext', text.textContent);
  });
  name();
  if (!panel.dataset.watched) {  /* sliders that are folded away are made when they are shown */
    panel.dataset.watched = 'yes';
    panel.addEventListener('click', () => setTimeout(name, 100));
  }
};
mark(this, 300);
