/** What a command has of the world besides files: the process's own streams and signals, or a test's. */
import type { Writable } from 'node:stream';

/** A stream for text, which may be a terminal. */
export type Output = Writable & { readonly isTTY?: boolean; readonly columns?: number; readonly rows?: number };

export interface Context {
  /** Results, and nothing else. */
  readonly stdout: Output;
  /** Progress, notes, warnings and errors. */
  readonly stderr: Output;
  readonly environment: Readonly<Record<string, string | undefined>>;
  /** Stops the command between two steps of its work. */
  readonly signal: AbortSignal;
}
