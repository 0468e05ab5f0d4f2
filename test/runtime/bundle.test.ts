import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import { describe, expect, it } from 'vitest';

const SRC = fileURLToPath(new URL('../../src', import.meta.url));
/** What runs in Node only, by the rule of the source tree. */
const NODE_ONLY = /(^|\/)(server|cli)\/|\.node\.ts$/;

const sources = readdirSync(SRC, { recursive: true, encoding: 'utf8' })
  .map((path) => path.replaceAll('\\', '/'))
  .filter((path) => path.endsWith('.ts') && !path.endsWith('.d.ts'));

/** Bundles sources for browsers; gives the complaints, which name the file and the import. */
async function complaints(entries: readonly string[]): Promise<string[]> {
  const options = { bundle: true, write: false, splitting: true, outdir: '/', format: 'esm' } as const;
  try {
    const { warnings } = await build({
      ...options,
      entryPoints: entries.map((path) => join(SRC, path)),
      platform: 'browser',
      logLevel: 'silent',
    });
    return warnings.map(({ text }) => text);
  } catch (error) {
    const { errors } = error as { errors: { text: string; location?: { file: string } }[] };
    return errors.map(({ text, location }) => `${location?.file}: ${text}`);
  }
}

describe('the sources outside server, cli and *.node.ts', () => {
  it('bundle for browsers', async () => {
    const portable = sources.filter((path) => !NODE_ONLY.test(path));
    expect(portable).toContain('runtime/web.ts');
    expect(await complaints(portable)).toEqual([]);
  });

  it('are told from those that need Node', async () => {
    expect(await complaints(['runtime/node.node.ts'])).toContainEqual(expect.stringContaining('node:os'));
  });
});
