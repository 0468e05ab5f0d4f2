import { describe, expect, it } from 'vitest';
import { fastestOf, fastestRuntime } from '../../src/runtime/fastest.node.ts';
import type { Runtime } from '../../src/runtime/runtime.ts';
import { cpu } from '../support/run.ts';

/** A runtime that takes some milliseconds longer for each run. */
function slowed(runtime: Runtime, milliseconds: number): Runtime {
  return {
    ...runtime,
    async compile(program, options) {
      const executable = await runtime.compile(program, options);
      return {
        ...executable,
        async run(inputs, runOptions) {
          await new Promise((resolve) => setTimeout(resolve, milliseconds));
          return executable.run(inputs, runOptions);
        },
      };
    },
  };
}

describe('the default device', () => {
  it('is the fastest of several', async () => {
    const slow = slowed(cpu, 500);
    expect(await fastestOf([slow, cpu])).toBe(cpu);
    expect(await fastestOf([cpu, slow])).toBe(cpu);
  });

  it('is none that fails', async () => {
    const broken: Runtime = { ...cpu, compile: () => Promise.reject(new Error('no such device')) };
    expect(await fastestOf([cpu, broken])).toBe(cpu);
  });

  it('works', async () => {
    await (await fastestRuntime()).check();
  });
});
