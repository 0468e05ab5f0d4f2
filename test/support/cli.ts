import { PassThrough } from 'node:stream';
import { run } from '../../src/cli/run.ts';

export interface CliResult {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

export interface TerminalOptions {
  /** Whether both streams are terminals (default no). */
  readonly isTTY?: boolean;
  readonly environment?: Readonly<Record<string, string>>;
}

/** Runs a command line in this process. */
export async function mmditx(
  argv: readonly string[],
  signal = new AbortController().signal,
  { isTTY = false, environment = {} }: TerminalOptions = {},
): Promise<CliResult> {
  const stream = () => Object.assign(new PassThrough(), { isTTY });
  const [stdout, stderr] = [stream(), stream()];
  const code = await run(argv, { stdout, stderr, environment, signal });
  return { code, stdout: String(stdout.read() ?? ''), stderr: String(stderr.read() ?? '') };
}
