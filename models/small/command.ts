/** The command line of the repository's sources, for the recipe: `mmditx` as an installed package has it. */

import { run } from '../../src/cli/run.ts';

/** Runs a command; fails where the command does. */
export async function main(argv: readonly string[]): Promise<void> {
  const stop = new AbortController();
  process.once('SIGINT', () => stop.abort(new Error('stopped')));
  const { stdout, stderr, env } = process;
  const code = await run(argv, { stdout, stderr, environment: env, signal: stop.signal });
  if (code !== 0) throw new Error(`mmditx ${argv.join(' ')} ended with ${code}.`);
}
