/** Networks that load when they are first used. */

import type { Executable } from '../runtime/runtime.ts';

export interface Lazy {
  /** The executable, compiled when first asked for; a compilation that failed is tried again. */
  get(): Promise<Executable>;
  /** Gives its memory back; asked for again, it is compiled again. */
  dispose(): Promise<void>;
}

export function lazily(compile: () => Promise<Executable>): Lazy {
  let compiled: Promise<Executable> | undefined;
  return {
    get() {
      compiled ??= compile();
      const current = compiled;
      current.catch(() => {
        if (compiled === current) compiled = undefined;
      });
      return current;
    },
    async dispose() {
      const old = compiled;
      compiled = undefined;
      // What failed to load holds nothing.
      const executable = await old?.catch(() => undefined);
      await executable?.dispose();
    },
  };
}
