import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { WebRuntimeOptions } from '../../src/runtime/web.ts';
import { type BrowserPage, browserNote, browserPath, openPage } from '../support/browser.ts';
import type { runInPage } from '../support/page.ts';
import { runSmall, smallPrograms } from '../support/programs.ts';
import { cpu, maxDifference } from '../support/run.ts';

/** Float32 sums in another order; the values and gradients compared are of size 0.1 to 10. */
const TOLERANCE = 1e-5;

function run({ page }: BrowserPage, name: keyof typeof smallPrograms, options: WebRuntimeOptions = {}) {
  return page.evaluate(
    ([name, options]) =>
      (globalThis as unknown as { exported: { runInPage: typeof runInPage } }).exported.runInPage(name, options),
    [name, options] as const,
  );
}

async function expectSameAsNode(browser: BrowserPage, name: keyof typeof smallPrograms, options: WebRuntimeOptions) {
  const outcome = await run(browser, name, options);
  if (!('results' in outcome)) throw new Error(outcome.message);
  expect(outcome.device).toBe(options.device);
  const expected = await runSmall(cpu, smallPrograms[name]());
  for (const results of outcome.results) {
    expect(Object.keys(results)).toEqual(Object.keys(expected));
    for (const [key, { dtype, shape, data }] of Object.entries(expected)) {
      expect(results[key]).toMatchObject({ dtype, shape });
      // Half precision comes as raw bits: equal, or neighbours where float32 sums round apart.
      expect(maxDifference(results[key]!, { data }), key).toBeLessThan(dtype === 'float16' ? 2 : TOLERANCE);
    }
  }
}

describe.skipIf(!browserPath)(`a browser without graphics${browserNote}`, () => {
  let browser: BrowserPage;
  beforeAll(async () => {
    browser = await openPage('test/support/page.ts');
  }, 60_000);
  afterAll(() => browser?.close());

  it('computes a loss and its gradients as Node does', () => expectSameAsNode(browser, 'training', { device: 'cpu' }));

  it('reads weights out of the bytes of a safetensors file', () =>
    expectSameAsNode(browser, 'boundWeights', { device: 'cpu' }));

  it('gives half precision as raw bits', () => expectSameAsNode(browser, 'halfPrecision', { device: 'cpu' }));

  it('says what WebGPU needs', async () => {
    expect(await run(browser, 'training', { device: 'webgpu' })).toEqual({
      code: 'device-unavailable',
      message: expect.stringMatching(/^Device "webgpu" cannot be used here\. It needs a browser with WebGPU .*"cpu"/),
    });
  });

  it('runs on the processor when no device is asked for', async () => {
    expect(await run(browser, 'boundWeights')).toMatchObject({ device: 'cpu' });
  });
});

describe.skipIf(!browserPath)(`a browser with WebGPU${browserNote}`, () => {
  let browser: BrowserPage;
  beforeAll(async () => {
    browser = await openPage('test/support/page.ts', { graphics: true });
  }, 60_000);
  afterAll(() => browser?.close());

  it('computes a loss and its gradients as Node does', () =>
    expectSameAsNode(browser, 'training', { device: 'webgpu' }));

  it('reads weights out of the bytes of a safetensors file', () =>
    expectSameAsNode(browser, 'boundWeights', { device: 'webgpu' }));
});
