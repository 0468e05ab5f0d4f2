/** Pages in headless Chromium that run this package's sources, bundled and served from memory. */

import { existsSync } from 'node:fs';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { createServer, type Server } from 'node:http';
import { createRequire } from 'node:module';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { basename, dirname, extname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import { chromium, type Page } from 'playwright-core';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const WASM_FOLDER = dirname(createRequire(import.meta.url).resolve('onnxruntime-web/wasm'));

/** Debian's Chromium, or the browser that the environment names; `undefined` where there is none. */
export const browserPath = [process.env.CHROMIUM_PATH, '/usr/bin/chromium'].find((path) => path && existsSync(path));

/** For the name of a suite that {@link browserPath} skips. */
export const browserNote = browserPath ? '' : ' (skipped: no /usr/bin/chromium; install Chromium or set CHROMIUM_PATH)';

const ARGUMENTS = [
  '--headless',
  '--no-sandbox',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
];
/** WebGPU on SwiftShader, Chromium's software driver. */
const SOFTWARE_GRAPHICS = ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader'];
const NO_GRAPHICS = ['--disable-gpu'];

const CONTENT_TYPES: Record<string, string> = {
  '.html': 'text/html',
  '.js': 'text/javascript',
  '.mjs': 'text/javascript',
  '.wasm': 'application/wasm',
};

export interface BrowserPage {
  readonly page: Page;
  close(): Promise<void>;
}

/**
 * Opens a page that has run a module of this repository.
 * @param entry path from the repository's root; what it exports is `globalThis.exported` in the page
 */
export async function openPage(entry: string, options: { graphics?: boolean } = {}): Promise<BrowserPage> {
  const server = await serve(await bundle(entry));
  const profile = await mkdtemp(join(tmpdir(), 'mmditx-browser-'));
  const context = await chromium.launchPersistentContext(profile, {
    executablePath: browserPath!,
    headless: true,
    args: [...ARGUMENTS, ...(options.graphics ? SOFTWARE_GRAPHICS : NO_GRAPHICS)],
  });
  const close = async () => {
    await context.close();
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
    await rm(profile, { recursive: true, force: true });
  };
  try {
    const page = await context.newPage();
    const failures: string[] = [];
    page.on('pageerror', (error) => failures.push(String(error)));
    await page.goto(`http://localhost:${(server.address() as AddressInfo).port}/`);
    await page.waitForFunction('globalThis.exported', undefined, { timeout: 20_000 }).catch((cause) => {
      throw new Error(`The page did not start: ${failures.join('; ')}`, { cause });
    });
    return { page, close };
  } catch (error) {
    await close();
    throw error;
  }
}

/** The files of a module bundled for browsers, by name; the page loads `main.js`. */
async function bundle(entry: string): Promise<Map<string, Uint8Array>> {
  const { outputFiles } = await build({
    stdin: {
      contents: `import * as exported from './${entry}'; globalThis.exported = exported;`,
      resolveDir: ROOT,
      sourcefile: 'main.ts',
    },
    bundle: true,
    write: false,
    splitting: true,
    outdir: '/',
    entryNames: 'main',
    platform: 'browser',
    format: 'esm',
    target: 'es2023',
    logLevel: 'silent',
  });
  return new Map(outputFiles.map(({ path, contents }) => [basename(path), contents]));
}

/** Serves a page, its script, and onnxruntime-web's files under `/wasm/`, cross-origin isolated so that threads work. */
async function serve(files: ReadonlyMap<string, Uint8Array>): Promise<Server> {
  const page = new TextEncoder().encode('<!doctype html><script type="module" src="main.js"></script>');
  const server = createServer(async (request, response) => {
    const path = new URL(request.url!, 'http://localhost').pathname;
    const name = basename(path);
    const body =
      path === '/'
        ? page
        : path.startsWith('/wasm/')
          ? await readFile(join(WASM_FOLDER, name)).catch(() => undefined)
          : files.get(name);
    const headers = {
      'content-type': CONTENT_TYPES[extname(name) || '.html'] ?? 'application/octet-stream',
      'cross-origin-opener-policy': 'same-origin',
      'cross-origin-embedder-policy': 'require-corp',
    };
    response.writeHead(body ? 200 : 404, headers).end(body);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return server;
}
