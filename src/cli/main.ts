#!/usr/bin/env node
/** The program `mmditx`: {@link run} with the process's arguments, streams and signals. */
import { EXIT_STOPPED, run } from './run.ts';

const stop = new AbortController();
process.on('SIGINT', () => {
  if (stop.signal.aborted) process.exit(EXIT_STOPPED);
  process.stderr.write('\nStopping after this step; press Ctrl-C again to stop at once.\n');
  stop.abort();
});
for (const stream of [process.stdout, process.stderr]) {
  stream.on('error', (error: NodeJS.ErrnoException) => {
    // Whoever read the output has read enough (`mmditx ... | head -1`).
    if (error.code === 'EPIPE') process.exit(0);
    if (stream === process.stdout) process.stderr.write(`mmditx: Cannot write the output: ${error.message}.\n`);
    process.exit(1);
  });
}

const { stdout, stderr, env: environment } = process;
process.exitCode = await run(process.argv.slice(2), { stdout, stderr, environment, signal: stop.signal });
