// The real ComfyUI frontend in a headless browser: what every script here begins with.
import chromium from '@sparticuz/chromium'
import { chromium as playwright } from 'playwright-core'

export async function startBrowser() {
  return playwright.launch({
    executablePath: await chromium.executablePath(),
    args: [...chromium.args, '--no-sandbox'],
    headless: true
  })
}

export async function newPage(browser) {
  return browser.newPage({ viewport: { width: 1600, height: 1000 } })
}

export async function openFrontend(page, url) {
  await page.goto(url, { waitUntil: 'domcontentloaded' })
  await page.waitForFunction(
    () => window.app?.graph && 'FluxFP4LoadEngine' in (window.LiteGraph?.registered_node_types ?? {}),
    null,
    { timeout: 90000 }
  )
  // The default graph's widgets mount after their nodes; replacing them half-way is not our subject.
  await page.waitForLoadState('networkidle')
  await page.waitForTimeout(2000)
}

export async function loadPrompt(page, prompt, name) {
  await page.evaluate(([workflow, title]) => app.loadApiJson(workflow, title), [prompt, name])
  await page.waitForFunction(
    (count) => app.graph.nodes.length === count,
    Object.keys(prompt).length,
    { timeout: 20000 }
  )
  await page.waitForTimeout(500)
}

export async function setSetting(page, name, value) {
  await page.evaluate(([key, chosen]) => app.extensionManager.setting.set(key, chosen), [name, value])
}
