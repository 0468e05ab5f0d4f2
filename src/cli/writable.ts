/** Finding out before hours of work whether its result can be written. */
import { randomUUID } from 'node:crypto';
import { open, rm, stat } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { ioError } from '../weights/atomic.node.ts';

/**
 * Tries to make a file in the folder of `path` and removes it again; permissions alone tell too little (read-only file
 * systems, folders that only look like some). A device or a pipe is opened instead, as it will be when it is written.
 * @throws MmditxError `io`
 */
export async function requireWritable(path: string): Promise<void> {
  const existing = await stat(path).catch(() => undefined);
  const special = existing !== undefined && !existing.isFile();
  const trial = special ? path : join(dirname(path), `.${randomUUID()}.tmp`);
  try {
    const handle = await open(trial, special ? 'r+' : 'wx');
    await handle.close();
    if (!special) await rm(trial);
  } catch (cause) {
    throw ioError('write', path, cause);
  }
}
