"""A headless Chromium, spoken to over two pipes: no port, no package."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys


def executable() -> str | None:
  """Where Chromium is; None where there is none."""
  names = ('chromium', 'chromium-browser', 'google-chrome')
  return next(filter(None, map(shutil.which, names)), None)


class Browser:
  """One browser with one page."""

  def __init__(self, profile):
    """
    Args:
      profile: An empty folder for what it keeps.
    """
    to_browser, self._write = os.pipe()
    self._read, from_browser = os.pipe()
    command = [
      executable(),
      *('--headless=new', '--no-sandbox', '--disable-gpu', '--no-first-run'),
      *('--disable-background-networking', '--remote-debugging-pipe'),
      *(f'--user-data-dir={profile}', 'about:blank'),
    ]
    # The browser reads from 3 and writes to 4. A process of its own sees to
    # that: code of ours before the command would be a fork, of which JAX warns.
    ends = [
      fcntl.fcntl(x, fcntl.F_DUPFD, 20) for x in (to_browser, from_browser)
    ]
    wire = (
      'import os, sys; read, write, *command = sys.argv[1:]; '
      'os.dup2(int(read), 3); os.dup2(int(write), 4); '
      'os.execv(command[0], command)'
    )
    self._process = subprocess.Popen(
      [sys.executable, '-c', wire, *map(str, ends), *command],
      pass_fds=ends,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    for end in (to_browser, from_browser, *ends):
      os.close(end)
    self._buffer, self._count, self.events = b'', 0, []
    self._session = None
    (page,) = (
      target
      for target in self.call('Target.getTargets')['targetInfos']
      if target['type'] == 'page'
    )
    self._session = self.call(
      'Target.attachToTarget', targetId=page['targetId'], flatten=True
    )['sessionId']
    for domain in ('Page', 'Network', 'Runtime', 'Log'):
      self.call(f'{domain}.enable')

  def call(self, method, **parameters):
    """One command; what comes in the meantime is kept in `events`."""
    self._count += 1
    message = {'id': self._count, 'method': method, 'params': parameters}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._write, json.dumps(message).encode() + b'\0')
    while True:
      answer = self._next()
      if answer.get('id') == self._count:
        if 'error' in answer:
          raise RuntimeError(f'{method}: {answer["error"]}')
        return answer['result']
      self.events.append(answer)

  def _next(self):
    while b'\0' not in self._buffer:
      more = os.read(self._read, 1 << 16)
      if not more:
        raise RuntimeError('the browser is gone')
      self._buffer += more
    message, _, self._buffer = self._buffer.partition(b'\0')
    return json.loads(message)

  def open(self, path, width, height=900, dark=False):
    """Open a file in a window of a size, until it is loaded."""
    self.call(
      'Emulation.setDeviceMetricsOverride',
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=width < 600,
    )
    scheme = 'dark' if dark else 'light'
    self.call(
      'Emulation.setEmulatedMedia',
      features=[{'name': 'prefers-color-scheme', 'value': scheme}],
    )
    self.events = []
    self.call('Page.navigate', url=path.resolve().as_uri())
    while not any(
      e.get('method') == 'Page.loadEventFired' for e in self.events
    ):
      self.events.append(self._next())

  def value(self, expression):
    """What an expression comes to in the page."""
    found = self.call(
      'Runtime.evaluate', expression=expression, returnByValue=True
    )
    return found['result'].get('value')

  def requests(self):
    """What was asked for since the page was opened."""
    return [
      event['params']['request']['url']
      for event in self.events
      if event.get('method') == 'Network.requestWillBeSent'
    ]

  def screenshot(self, path, whole=True):
    """A picture of the page, or of what is in view."""
    found = self.call('Page.captureScreenshot', captureBeyondViewport=whole)
    path.write_bytes(base64.b64decode(found['data']))

  def close(self):
    os.close(self._write)
    self._process.terminate()
    self._process.wait(30)
    os.close(self._read)
