/** What the browser tests run inside the page: the programs of `programs.ts` through the browser's runtime. */

import { MmditxError } from '../../src/errors.ts';
import { type WebRuntimeOptions, webRuntime } from '../../src/runtime/web.ts';
import { runSmall, smallPrograms } from './programs.ts';

/** Results as plain arrays, which is what can leave a page. */
export type PageResults = Record<string, { dtype: string; shape: readonly number[]; data: number[] }>;

/** Runs a program twice at the same time and gives the device and both results, or the error's code and message. */
export async function runInPage(
  name: keyof typeof smallPrograms,
  options: WebRuntimeOptions,
): Promise<{ device: string; results: PageResults[] } | { code: string; message: string }> {
  try {
    const runtime = await webRuntime({ wasmPaths: new URL('/wasm/', location.href).href, ...options });
    const both = await Promise.all([1, 2].map(() => runSmall(runtime, smallPrograms[name]())));
    const plain = both.map((results) =>
      Object.fromEntries(
        Object.entries(results).map(([key, { dtype, shape, data }]) => [
          key,
          { dtype, shape: [...shape], data: Array.from(data as ArrayLike<number | bigint>, Number) },
        ]),
      ),
    );
    return { device: runtime.device, results: plain };
  } catch (error) {
    if (!(error instanceof MmditxError)) throw error;
    return { code: error.code, message: error.message };
  }
}
