/* Runs whenever the words below the picture are new: what ipywidgets has no trait for. */
const panel = this.closest('.kfac-panel');
panel.querySelector('img.widget-image').alt = this.dataset.alt;
panel.querySelectorAll('.widget-slider').forEach(slider => {
  const handle = slider.querySelector('.noUi-handle'), text = slider.querySelector('.widget-readout');
  handle.setAttribute('aria-label', slider.querySelector('.widget-label').textContent);
  if (text) handle.setAttribute('aria-valuetext', text.textContent);
});
